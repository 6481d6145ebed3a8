"""What a process holds and sends of a model that is divided, from shapes alone: for the plan of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.layouts.context import PIECES, padded, seen
from training_hub.backends.torch_engine.layouts.experts import experts_of, run_part
from training_hub.backends.torch_engine.layouts.fully_sharded import LOW_PRECISION, blocks_of
from training_hub.backends.torch_engine.layouts.tensor import split_dimensions
from training_hub.recipe.parallelism import Parallelism, degrees_of
from training_hub.types import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SLICES = "training_hub_slices"
"""Attribute of a weight without contents: in how many slices it lies, where not in as many as others."""


@dataclass(frozen=True)
class Share:
    """In how many slices weights lie, over how many replicas; among how many the samples of a step are dealt out;
    whether weights stay gathered during a step, and whether slices lie beside the device's memory.

    heads: among how many heads, widths and the vocabulary are split. is_sliced: whether these processes have a slice of
    the tokens each between attention and MLPs. tokens: among how many those of a pack are split. experts:
    among how many experts are dealt out, and in how many slices they then lie. gathers_head: whether the head is
    gathered for the loss.
    """

    slices: int = 1
    replicas: int = 1
    of_data: int = 1
    stays_whole: bool = False
    is_offloaded: bool = False
    heads: int = 1
    is_sliced: bool = False
    tokens: int = 1
    experts: int = 1
    expert_slices: int = 1
    gathers_head: bool = False

    @property
    def has_whole_weights(self) -> bool:
        """Whether each weight that a process has is whole there."""
        return self.slices == self.heads == self.experts == 1

    @staticmethod
    def of(asked: Parallelism, world_size: int) -> Share:
        """What a recipe's section asks for."""
        degrees = degrees_of(asked, world_size)
        return Share(
            degrees.dp_shard,
            degrees.dp_replicate,
            world_size // degrees.sharers,
            asked.fsdp_reshard_after_forward == "never",
            asked.enable_cpu_offload,
            degrees.tp,
            degrees.tp > 1 and asked.sequence_parallel,
            degrees.cp,
            degrees.ep,
            degrees.efsdp if degrees.dp_shard > 1 else 1,
            asked.disable_loss_parallel,
        )


EVERYTHING = Share()


def cut_down(blank: Any, share: Share) -> frozenset[nn.Parameter]:
    """Leave a model without contents what the first process has of weights that are split by heads, or dealt out as
    experts, in place; those of experts that are dealt out, and not sliced."""
    named = dict(experts_of(blank))
    mixtures = list(named.values())
    dealt = mixtures if share.experts > 1 else []
    if share.heads > 1:
        for weight, dimension in list(split_dimensions(blank, deals_experts=not dealt)):
            _shorten(weight, dimension, share.heads)
        for module in mixtures if not dealt else ():
            module.num_experts = len(next(module.parameters(recurse=False)))
    for module in dealt:
        for weight in module.parameters(recurse=False):
            _shorten(weight, 0, share.experts)
            setattr(weight, SLICES, share.expert_slices)
        module.num_experts = -(-module.num_experts // share.experts)
    for name in named if dealt or share.heads > 1 else ():
        run_part(blank, name)
    for module in blank.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it may be a row of another process
    unsliced = dealt if share.expert_slices == 1 else []
    return frozenset(weight for module in unsliced for weight in module.parameters(recurse=False))


def _shorten(weight: nn.Parameter, dimension: int, among: int) -> None:
    shape = list(weight.shape)
    shape[dimension] = -(-shape[dimension] // among)
    weight.data = weight.data.new_empty(shape)


def held(weight: Tensor, share: Share, apart: Collection[nn.Parameter]) -> Tensor:
    """A tensor without contents of the shape of the first process's slice of a weight; itself where it has no slices.

    apart: weights that are not sliced.
    """
    if share.slices == 1 or any(weight is one for one in apart):
        return weight
    rows = -(-weight.shape[0] // getattr(weight, SLICES, share.slices))
    return torch.empty((rows, *weight.shape[1:]), dtype=weight.dtype, device="meta")


def part_of(one: Pack, share: Share) -> Pack:
    """What the first process has of the tokens of a pack, as a pack of one document."""
    if share.tokens == 1:
        return one
    whole = padded(one, PIECES * share.tokens)
    length = len(whole.ids) // (PIECES * share.tokens)
    mine = np.r_[0:length, len(whole.ids) - length : len(whole.ids)]
    following = np.append(whole.weights[1:], np.float32(0))[mine]
    return replace(
        whole,
        ids=whole.ids[mine],
        positions=whole.positions[mine],
        weights=np.append(np.float32(0), following[:-1]),
        boundaries=np.array([0, 2 * length], dtype=whole.boundaries.dtype),
        samples=whole.samples[:1],
    )


def mask_numbers(one: Pack, share: Share) -> int:
    """Numbers of the masks by which the first process attends in a layer: of each document the tokens that it has, by
    those that these see, where that is more than themselves."""
    if share.tokens == 1:
        return 0
    whole = padded(one, PIECES * share.tokens)
    length, total = len(whole.ids) // (PIECES * share.tokens), len(whole.ids)
    pieces = ((0, length), (total - length, total))
    found = (each for piece in pieces for each in seen(np.diff(whole.boundaries).tolist(), *piece))
    return sum((last - first) * (last - start) for start, first, last in found if first > start)


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model: in all, of what trains, of its largest block, and of what stands around the blocks; of these
    two those that train."""

    total: int
    trained: int
    block: int
    around: int
    block_trained: int
    around_trained: int

    @staticmethod
    def of(model: PreTrainedModel, apart: Collection[nn.Parameter] = ()) -> Sizes:
        """Those of a model that may lie on the meta device; `apart` is left out."""
        left = {id(one) for one in apart}

        def numbers(module: nn.Module, *, trained: bool = False) -> int:
            found = (one for one in module.parameters() if id(one) not in left)
            return sum(one.numel() for one in found if one.requires_grad or not trained)

        blocks = [numbers(block) for block in blocks_of(model)]
        learning = [numbers(block, trained=True) for block in blocks_of(model)]
        total, trained = numbers(model), numbers(model, trained=True)
        most = max(blocks, default=0), total - sum(blocks)
        return Sizes(total, trained, *most, max(learning, default=0), trained - sum(learning))


@dataclass(frozen=True)
class Slices:
    """Numbers of a process's slices: of what is frozen, of what trains, and of weights that are not sliced."""

    frozen: int
    trained: int
    apart: int

    @staticmethod
    def of(model: nn.Module, share: Share, apart: Collection[nn.Parameter]) -> Slices:
        """Those of the first process, which has the most."""
        left = {id(one) for one in apart}
        counts = [0, 0]
        for one in model.parameters():
            if id(one) not in left:
                counts[one.requires_grad] += held(one, share, ()).numel()
        return Slices(counts[0], counts[1], sum(one.numel() for one in apart))


def divided_parts(
    parts: dict[str, Any],
    model: PreTrainedModel,
    share: Share,
    dtype: torch.dtype,
    apart: Collection[nn.Parameter],
    spared: float = 0,
) -> dict[str, Any]:
    """Bytes by part of a process with slices, from those of one with everything; what its optimizer keeps is known, and
    masters of what is not sliced.

    gathered: what stands around the blocks, a block and the one that is fetched ahead. apart: weights that are not
    sliced. spared: bytes by which frozen weights are smaller than in `dtype`.
    """
    exact = 4 if dtype in LOW_PRECISION else dtype.itemsize
    width, sizes, slices = dtype.itemsize, Sizes.of(model, apart), Slices.of(model, share, apart)
    trained_apart = sum(one.numel() for one in apart if one.requires_grad)
    beside = parts["weights"] - (sizes.total + slices.apart) * width + spared
    added = parts["gradients"] - (sizes.trained + trained_apart) * exact
    at_once = sizes.total if share.stays_whole else sizes.around + 2 * sizes.block
    kept = slices.frozen * width - spared / share.slices + slices.trained * exact
    gradients = sizes.trained if share.stays_whole else slices.trained
    on_device = not share.is_offloaded
    return {
        **parts,
        "weights": kept * on_device + slices.apart * width + beside,
        "gathered": at_once * width,
        "gradients": (gradients * (on_device or share.stays_whole) + trained_apart) * exact + max(added, 0),
    }


def exchanged_bytes(
    sizes: Sizes, share: Share, dtype: torch.dtype, packs: float, *, makes_later: bool = False
) -> float:
    """Bytes that a process sends in a step of so many packs of its own.

    Replicas add up every float32 gradient in a ring, where it passes twice. Slices are gathered for each pass, those of
    blocks for the backward pass again, and gradients are added up into slices after it. makes_later: gradients of
    weights are made apart from those of activations, for which all are gathered once more.
    """
    exact = 4 if dtype in LOW_PRECISION else dtype.itemsize
    among, between = (share.slices - 1) / share.slices, 2 * (share.replicas - 1) / share.replicas
    if share.slices == 1:
        return between * exact * sizes.trained
    passes = 1 if share.stays_whole else max(1.0, packs)
    times = 3 if makes_later else 2
    gathered = sizes.total if share.stays_whole else times * sizes.total - sizes.around * (not makes_later)
    each = gathered * dtype.itemsize + sizes.trained * exact
    return among * each * passes + between * exact * sizes.trained / share.slices
