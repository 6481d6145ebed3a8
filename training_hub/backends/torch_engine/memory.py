"""How much memory a run will take, from the shapes of its model: no weight is loaded and nothing is computed.

What grows with the weights is counted. What forward keeps for backward is found by running the objective on torch's
"meta" device, where tensors have shapes but no contents, and adding up what autograd saves.
"""

# T tokens of the pack, Q query heads, D width of a query head, E width of a value head

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.objectives.head import chunk_rows, find_head
from training_hub.backends.torch_engine.optim import LOW_PRECISION
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.recipe.sections import Optimizer
from training_hub.types import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
SHAPES_ONLY = "training_hub_shapes"

# Numbers that the optimizer keeps for each weight; the first also without momentum.
STATES = {"AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2, "SGD": 0, "RMSprop": 1, "Adagrad": 1}
WITH_MOMENTUM = ("SGD", "RMSprop")

Estimate = dict[str, Any]


def estimate(
    model: PreTrainedModel, optimizer: Optimizer, dtype: torch.dtype, device: torch.device, largest: Pack
) -> Estimate:
    """GiB by what takes them, for a step whose largest pack is `largest`; `total` adds them up.

    activations is None, and total without it, where the model cannot be run without contents; `note` then says why.
    The total is what the tensors take: not the libraries, nor what an allocator loses between them.
    """
    blank = blank_like(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    is_low = dtype in LOW_PRECISION
    exact = 4 if is_low else dtype.itemsize
    parts: Estimate = {
        "weights": sum(p.numel() for p in model.parameters()) * dtype.itemsize,
        "masters": sum(p.numel() for p in trained) * 4 if is_low else 0,
        "gradients": sum(p.numel() for p in trained) * exact,
        "optimizer": optimizer_numbers(trained, optimizer) * exact,
        "activations": None,
        "logits": logit_bytes(model, dtype, device, int((largest.weights != 0).sum())),
    }
    note = ""
    try:
        parts["activations"] = saved_bytes(blank.to(dtype), largest, is_copied=device.type != "cuda")
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines()
        note = f"activations are not estimated: {type(error).__name__}: {lines[0] if lines else ''}"
    sizes = {name: value / GIB if value is not None else None for name, value in parts.items()}
    return {**sizes, "total": sum(value for value in sizes.values() if value is not None), "note": note}


def blank_like(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture on the meta device, for itself, so that nothing of `model` changes."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = None
    with torch.device("meta"):
        blank = type(model)(config)
    blank.config.pad_token_id = None  # else some models look for padding in the ids, which have no contents here
    for parameter, own in zip(blank.parameters(), model.parameters(), strict=False):
        parameter.requires_grad_(own.requires_grad)
    return blank


def optimizer_numbers(weights: Iterable[Tensor], settings: Optimizer) -> int:
    """How many numbers the optimizer keeps for these weights."""
    if settings.name == "Adafactor":  # sums over rows and columns of a matrix in place of its squares
        return sum(_factored(tuple(weight.shape)) for weight in weights)
    each = STATES[settings.name] + (1 if settings.name in WITH_MOMENTUM and settings.momentum else 0)
    return sum(weight.numel() for weight in weights) * each


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    outer = math.prod(shape[:-2])
    return outer * (shape[-2] + shape[-1])


def logit_bytes(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, trained: int) -> int:
    """The most that logits take at once: one chunk in float32, its exponentials, and its gradient in `dtype`."""
    vocabulary = model.config.get_text_config().vocab_size
    exact = torch.promote_types(dtype, torch.float32).itemsize
    if find_head(model) is None:  # the model's own head, whose logits stay for backward
        return trained * vocabulary * 3 * exact
    rows = min(trained, chunk_rows(vocabulary, device.type))
    return rows * vocabulary * (2 * exact + (dtype.itemsize if dtype in LOW_PRECISION else 0))


def saved_bytes(blank: PreTrainedModel, largest: Pack, *, is_copied: bool) -> int:
    """Bytes that forward keeps for backward, for this pack. is_copied: attention gives out a copy of what it keeps."""
    from transformers import AttentionInterface

    # Not known to AttentionMaskInterface: then transformers makes no mask, and asks for no contents to make one from.
    AttentionInterface.register(SHAPES_ONLY, _copied_attention if is_copied else _shapes_attention)
    blank.set_attn_implementation(SHAPES_ONLY)
    blank.train()
    saved: dict[int, Tensor] = {}
    own = {id_of(parameter) for parameter in blank.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in own:
            saved[id_of(tensor)] = tensor  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CrossEntropy(through_head=find_head(blank) is not None)(blank, to_device(largest, "meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def id_of(tensor: Tensor) -> int:
    """What tensors over the same memory have in common; tensors without contents have no address."""
    return tensor.untyped_storage()._cdata


class _Attention(torch.autograd.Function):
    """The shapes of fused attention: queries, keys, values and result are kept, scores are not."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result_QTE = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result_QTE)
        return result_QTE

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _shapes_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2), None


def _copied_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None
