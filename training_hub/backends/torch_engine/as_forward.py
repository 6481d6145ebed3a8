"""Work on a model that reaches for its weights itself, as if it were a forward pass of it.

A model whose weights are divided over processes gathers those of its embeddings, last norm and head when its `forward`
is called. A loss that calls the decoder alone and multiplies by the head's weight does so within `as_forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "training_hub_as_forward"
"""Attribute of a divided model: what runs work, whose result is a tensor or a tuple of tensors, as its forward pass."""

DEVICE = "training_hub_device"
"""Attribute of a divided model: where it computes, which may not be where its slices lie."""

DTYPE = "training_hub_dtype"
"""Attribute of a divided model: what it computes in, which may not be what its slices are kept in."""


def as_forward(model: Any, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `work` gives, a tuple of tensors, with the weights of `model` at hand."""
    run = getattr(model, NAME, None)
    found: tuple[Tensor, ...] = work() if run is None else run(work)
    return found


def device_of(model: Any) -> torch.device:
    """Where the model computes."""
    found: torch.device = getattr(model, DEVICE, None) or next(model.parameters()).device
    return found


def dtype_of(model: Any) -> torch.dtype:
    """What the model computes in."""
    found: torch.dtype = getattr(model, DTYPE, None) or next(model.parameters()).dtype
    return found
