"""Quantization-aware training: linear layers that round in forward as a quantised model does, by torchao.

y = r(x) r(W)^T, where r(w) = s * clamp(round(w / s)) with a scale s for each group of a row of W, or each token of x.
Gradients pass through the rounding as if it were not there (Bengio et al. 2013, arXiv:1308.3432; for networks Jacob et
al. 2018, arXiv:1712.05877). The weights that move and are saved are W.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.loading.quiet import quiet
from training_hub.backends.torch_engine.saving.model_files import ModelFiles
from training_hub.errors import RecipeError
from training_hub.recipe.qat import Qat

SHOWN = 3


def problems(chosen: Qat) -> list[str]:
    """What keeps layers from rounding here, with its remedy."""
    if chosen.weight_dtype is None or find_spec("torchao") is not None:
        return []
    return [
        f"qat.weight_dtype: {chosen.weight_dtype} needs torchao, which is not installed: "
        "pip install 'training-hub[torchao]'. Or leave qat out."
    ]


def quantised_form(chosen: Qat) -> Any:
    """torchao's configuration of the quantised model that is trained for, as quantize_ and TorchAoConfig take it."""
    with quiet():
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup

    number, groups = getattr(torch, str(chosen.weight_dtype)), PerGroup(chosen.group_size)
    if chosen.activation_dtype is None:
        return IntxWeightOnlyConfig(weight_dtype=number, granularity=groups)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=number, weight_granularity=groups)


def round_in_forward(model: nn.Module, chosen: Qat) -> str | None:
    """Let every linear layer but the head round as `chosen` says, in place; what a user should be told, if anything.

    Parameters and their names stay; the model may lie on the meta device. Raises RecipeError where there is no such
    layer or a width is not made up of whole groups.
    """
    if chosen.weight_dtype is None:
        return None
    found = dict(_layers(model))
    _refuse_widths(model, found, chosen)
    with quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        wanted = {id(layer) for layer in found.values()}
        quantize_(model, QATConfig(quantised_form(chosen)), filter_fn=lambda module, name: id(module) in wanted)
    inputs = f" and inputs to {chosen.activation_dtype}" if chosen.activation_dtype else ""
    return (
        f"{len(found)} linear layers round weights to {chosen.weight_dtype} in groups of {chosen.group_size}{inputs}, "
        "as torchao will"
    )


def round_no_more(model: nn.Module) -> None:
    """Undo `round_in_forward`; the weights stay."""
    if not any(is_rounding(module) for module in model.modules()):
        return
    with quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"), filter_fn=lambda module, name: is_rounding(module))


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Within the block no layer rounds."""
    layers = [module for module in model.modules() if is_rounding(module)]
    if not layers:
        yield
        return
    from torchao.quantization.qat.linear import enable_linear_fake_quant

    for layer in layers:
        enable_linear_fake_quant(layer, False)
    try:
        yield
    finally:
        for layer in layers:
            enable_linear_fake_quant(layer, True)


def is_rounding(module: nn.Module) -> bool:
    """Whether this layer rounds in forward."""
    return hasattr(module, "weight_fake_quantizer")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            yield name, module


def _refuse_widths(model: nn.Module, layers: dict[str, nn.Linear], chosen: Qat) -> None:
    where, size = "qat.group_size", chosen.group_size
    if not layers:
        raise RecipeError(
            f"qat.weight_dtype: {type(model).__name__} has no linear layers of torch, which are what torchao rounds. "
            "Leave qat out."
        )
    odd = {name: layer.in_features for name, layer in layers.items() if layer.in_features % size}
    if odd:
        divisor = next(n for n in range(size, 0, -1) if all(layer.in_features % n == 0 for layer in layers.values()))
        shown = ", ".join(f"{name} ({width})" for name, width in list(odd.items())[:SHOWN])
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        remedy = f"Write {where}: {divisor}" if divisor > 1 else "Leave qat out"
        raise RecipeError(f"{where}: {size} does not divide the width of {shown}{more}. {remedy}.")


@dataclass(frozen=True)
class RoundingModel:
    """A whole model that is read again to round in forward, as it was trained: what it says so is compared."""

    whole: ModelFiles
    chosen: Qat
    dtype: torch.dtype | None = None

    def save(self, model: Any, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Any) -> None:
        """An ordinary folder: the weights that moved."""
        self.whole.save(model, tensors, dtype, folder)

    def load(self, model: Any, dtype: torch.dtype, folder: Any) -> tuple[Any, dict[str, Tensor], list[str]]:
        """The model of the folder, which rounds; its tensors; and what was wrong with them."""
        loaded, tensors, wrong = self.whole.load(model, dtype, folder)
        round_in_forward(loaded, self.chosen)
        return loaded, tensors, wrong
