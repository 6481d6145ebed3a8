"""PEFT, imported where it is used, without what it and the packages that it looks for say when they are loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

from torch import nn

from training_hub.backends.torch_engine.loading.quiet import quiet

__all__ = ["MISSING", "is_installed", "load", "quiet", "silent"]

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
