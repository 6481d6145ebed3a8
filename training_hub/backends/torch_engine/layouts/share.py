"""What a process holds and sends of a model that is divided, from shapes alone: for the plan of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training_hub.backends.torch_engine.layouts.fully_sharded import LOW_PRECISION, blocks_of
from training_hub.recipe import Recipe
from training_hub.recipe.parallelism import degrees_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Share:
    """In how many slices weights lie, over how many replicas; among how many the samples of a step are dealt out;
    whether weights stay gathered during a step, and whether slices lie beside the device's memory."""

    slices: int = 1
    replicas: int = 1
    of_data: int = 1
    stays_whole: bool = False
    is_offloaded: bool = False

    @staticmethod
    def of(recipe: Recipe, world_size: int) -> Share:
        """What the recipe asks for."""
        degrees, asked = degrees_of(recipe.parallelism, world_size), recipe.parallelism
        stays_whole = asked.fsdp_reshard_after_forward == "never"
        of_data = world_size // degrees.sharers
        return Share(degrees.dp_shard, degrees.dp_replicate, of_data, stays_whole, asked.enable_cpu_offload)


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model: in all, of what trains, of its largest block, and of what stands around the blocks."""

    total: int
    trained: int
    block: int
    around: int

    @staticmethod
    def of(model: PreTrainedModel) -> Sizes:
        """Those of a model that may lie on the meta device."""
        parameters = list(model.parameters())
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(model)]
        total = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return Sizes(total, trained, max(blocks, default=0), total - sum(blocks))


def divided_parts(
    parts: dict[str, float | None], sizes: Sizes, share: Share, dtype: torch.dtype, own_optimizer: int
) -> dict[str, float | None]:
    """Bytes by part of a process with slices, from those of one with everything.

    gathered: what stands around the blocks, a block and the one that is fetched ahead. own_optimizer: what the
    optimizer keeps for numbers of an adaptation, which are whole in each process, as is all else of it.
    """
    exact = 4 if dtype in LOW_PRECISION else dtype.itemsize
    slices, width = share.slices, dtype.itemsize
    beside = (parts["weights"] or 0) - sizes.total * width
    added = (parts["gradients"] or 0) - sizes.trained * exact
    at_once = sizes.total if share.stays_whole else sizes.around + 2 * sizes.block
    held = ((sizes.total - sizes.trained) * width + sizes.trained * exact) / slices
    gradients = sizes.trained * exact if share.stays_whole else sizes.trained * exact / slices + sizes.block * exact
    states = ((parts["optimizer"] or 0) - own_optimizer) / slices
    on_device = not share.is_offloaded
    return {
        **parts,
        "weights": held * on_device + beside,
        "masters": 0,
        "gathered": at_once * width,
        "gradients": gradients * (on_device or share.stays_whole) + max(added, 0),
        "optimizer": states * on_device + own_optimizer,
    }


def exchanged_bytes(sizes: Sizes, share: Share, dtype: torch.dtype, packs: float) -> float:
    """Bytes that a process sends in a step of so many packs of its own.

    Replicas add up every float32 gradient in a ring, where it passes twice. Slices are gathered for each pass, those of
    blocks for the backward pass again, and gradients are added up into slices after it.
    """
    exact = 4 if dtype in LOW_PRECISION else dtype.itemsize
    among, between = (share.slices - 1) / share.slices, 2 * (share.replicas - 1) / share.replicas
    if share.slices == 1:
        return between * exact * sizes.trained
    passes = 1 if share.stays_whole else max(1.0, packs)
    gathered = sizes.total if share.stays_whole else 2 * sizes.total - sizes.around
    each = gathered * dtype.itemsize + sizes.trained * exact
    return among * each * passes + between * exact * sizes.trained / share.slices
