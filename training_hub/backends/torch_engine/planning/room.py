"""Room on disk: what a run will write, whether it fits, and what to say when it does not.

A checkpoint is counted exactly: the weights as the optimizer moves them and the optimizer's numbers for each. The new
checkpoint is whole before an old one goes, so one more lies on disk than are kept.
"""

from __future__ import annotations

import torch
from torch import nn

from training_hub.backends.shared.disk import BESIDE_TENSORS, Room, room_for
from training_hub.backends.torch_engine.adaptations.holdings import NOTHING, Holdings
from training_hub.backends.torch_engine.optim import LOW_PRECISION
from training_hub.backends.torch_engine.planning.of_optimizers import optimizer_bytes, tables_in
from training_hub.recipe import Recipe


def room(
    recipe: Recipe,
    model: nn.Module,
    dtype: torch.dtype,
    final_dtype: torch.dtype,
    saves: int,
    kept: int,
    holdings: Holdings = NOTHING,
) -> Room:
    """What the run will write, given the `saves` ahead and the checkpoints `kept` from before.

    `model` may lie on the meta device: only the shapes of its weights count. It computes in `dtype`.
    """
    weights: list[torch.Tensor] = [
        p for name, p in model.named_parameters() if p.requires_grad and name not in holdings.claimed
    ]
    weights.append(torch.empty(holdings.trained, device="meta"))
    width = 4 if dtype in LOW_PRECISION else dtype.itemsize
    numbers = sum(weight.numel() for weight in weights) + holdings.saved
    checkpoint = numbers * width + optimizer_bytes(weights, recipe.optimizer, width, tables_in(model)) + BESIDE_TENSORS
    everything = sum(p.numel() for p in model.parameters())
    exported = everything if holdings.exported is None else holdings.exported
    final = exported * final_dtype.itemsize if recipe.checkpoint.final else 0
    return room_for(checkpoint, final, saves, kept, recipe.checkpoint)
