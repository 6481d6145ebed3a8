"""PEFT, imported where it is used, without what it and the packages that it looks for say when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

from torch import nn

from training_hub.backends.torch_engine.loading.quiet import quiet

__all__ = ["MISSING", "disabled", "is_installed", "load", "quiet", "silent"]

MISSING = "peft is not installed, and adapters are trained by it: pip install 'training-hub[peft]'"


def is_installed() -> bool:
    return find_spec("peft") is not None


def load() -> Any:
    """The module peft."""
    with quiet():
        import peft

        return peft


def silent(model: nn.Module) -> AbstractContextManager[None]:
    """Within it the LoRA in the model adds nothing to what the weights beside it say; there must be some."""
    with quiet():
        from peft.helpers import rescale_adapter_scale
    scaled: AbstractContextManager[None] = rescale_adapter_scale(model, 0)
    return scaled


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it nothing that PEFT has put into the model does anything; what trains still does afterwards."""
    with quiet():
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    trains = [(one, one.requires_grad) for one in model.parameters()]
    layers = [one for one in model.modules() if isinstance(one, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for one, does in trains:
            one.requires_grad_(does)
