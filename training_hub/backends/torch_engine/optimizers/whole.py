"""Which weights an optimizer can only move whole: those of which it looks at rows, columns or blocks of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from training_hub.backends.torch_engine.optimizers.blocks import LEAST
from training_hub.backends.torch_engine.optimizers.library import LEAST_8BIT
from training_hub.recipe.sections import Optimizer as OptimizerSettings

Shape = tuple[int, ...]

WHOLE: Mapping[str, Callable[[Shape, bool], bool]] = {
    "Adafactor": lambda shape, is_matrix: True,  # also its steps are as large as the weight, on average
    "Muon": lambda shape, is_matrix: is_matrix,
    "GaLoreAdamW": lambda shape, is_matrix: is_matrix,
    **{
        f"{kind}8bit": lambda shape, is_matrix: prod(shape) >= LEAST_8BIT
        for kind in ("AdamW", "Lion", "PagedAdamW", "PagedLion")
    },
}
"""By `optimizer.name`: whether a weight of this shape is one; is_matrix: whether it is a matrix inside the blocks. All
others move each number by itself."""


def wants_whole(settings: OptimizerSettings, shape: Shape, is_matrix: bool) -> bool:
    """Whether a weight of this shape must be whole where the optimizer moves it."""
    if settings.state == "8bit":
        return prod(shape) >= LEAST
    return settings.name in WHOLE and WHOLE[settings.name](shape, is_matrix)
