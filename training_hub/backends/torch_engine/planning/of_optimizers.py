"""What an optimizer keeps of the weights that it moves, and holds on the way to the owners of whole ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from training_hub.backends.torch_engine.adaptations.holdings import Holdings
from training_hub.backends.torch_engine.layouts.share import Share, held
from training_hub.backends.torch_engine.optim import LOW_PRECISION
from training_hub.backends.torch_engine.optimizers.compact import moment_bytes
from training_hub.backends.torch_engine.optimizers.library import KINDS, table_names
from training_hub.backends.torch_engine.optimizers.library import kept_bytes as library_bytes
from training_hub.backends.torch_engine.optimizers.whole import wants_whole
from training_hub.recipe.sections import Optimizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Numbers that the optimizer keeps for each weight; the first also without momentum.
STATES = {"AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2, "SGD": 0, "RMSprop": 1, "Adagrad": 1}
WITH_MOMENTUM = ("SGD", "RMSprop")


def optimizer_numbers(weights: Iterable[Tensor], settings: Optimizer) -> int:
    """How many numbers the optimizer keeps for these weights."""
    if settings.name == "Adafactor":  # sums over rows and columns of a matrix in place of its squares
        return sum(_factored(tuple(weight.shape)) for weight in weights)
    each = STATES[settings.name] + (1 if settings.name in WITH_MOMENTUM and settings.momentum else 0)
    return sum(weight.numel() for weight in weights) * each


def tables_in(model: nn.Module) -> frozenset[int]:
    """`id` of the parameters that are embeddings or the head."""
    names = table_names(model)
    return frozenset(id(parameter) for name, parameter in model.named_parameters() if name in names)


def optimizer_bytes(weights: Iterable[Tensor], settings: Optimizer, width: int, tables: Collection[int] = ()) -> int:
    """What the optimizer keeps for these weights, `width` bytes for each number that is not one byte.

    tables: `id` of those that are embeddings or the head.
    """
    if settings.name in KINDS:
        return library_bytes(weights, settings, width, tables)
    if settings.state == "8bit":
        return sum(moment_bytes(weight.numel()) for weight in weights)
    return optimizer_numbers(weights, settings) * width


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    outer = math.prod(shape[:-2])
    return outer * (shape[-2] + shape[-1])


def kept_in_slices(
    trained: list[nn.Parameter],
    own: Tensor,
    blank: PreTrainedModel,
    optimizer: Optimizer,
    share: Share,
    exact: int,
    apart: Collection[nn.Parameter],
) -> float:
    """What the optimizer keeps of slices and, as far as this process owns them, of whole weights."""
    tables = tables_in(blank)
    whole = [w for w in trained if wants_whole(optimizer, tuple(w.shape), w.dim() == 2 and id(w) not in tables)]
    owned = {id(weight) for weight in whole}
    pieces = {id(weight): held(weight, share, apart) for weight in trained if id(weight) not in owned}
    of_tables = {id(piece) for number, piece in pieces.items() if number in tables}
    in_slices = optimizer_bytes(pieces.values(), optimizer, exact, of_tables)
    of_whole = optimizer_bytes(whole, optimizer, exact, tables) / share.slices
    of_slices = (in_slices + of_whole) * (not share.is_offloaded)
    return of_slices + optimizer_bytes([own], optimizer, exact)


def owned_bytes(
    blank: PreTrainedModel, optimizer: Optimizer, holdings: Holdings, dtype: torch.dtype, share: Share
) -> int:
    """What there is of a whole weight, and its gradient, on the way to its owner: the largest that has one, as often as
    pieces are sent and got, and put together."""
    claimed = holdings.claimed
    tables, exact = tables_in(blank), 4 if dtype in LOW_PRECISION else dtype.itemsize
    trained = (p for name, p in blank.named_parameters() if p.requires_grad and name not in claimed)
    whole = (p for p in trained if wants_whole(optimizer, tuple(p.shape), p.dim() == 2 and id(p) not in tables))
    most = 6 * max((p.numel() for p in whole), default=0)
    return max(most, 4 * holdings.largest if share.slices > 1 else 0) * exact
