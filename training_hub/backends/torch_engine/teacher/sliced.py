"""A teacher whose weights lie in slices among the processes that ask it: whole in none of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from training_hub.backends.torch_engine.layouts.fully_sharded import shard_frozen
from training_hub.backends.torch_engine.loading.dividing import broken_pieces, filled, load_blank, looked_at
from training_hub.backends.torch_engine.loading.model import LoadedModel, load_model
from training_hub.recipe import Recipe
from training_hub.types import Console


def load_sliced(
    recipe: Recipe,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int],
    console: Console,
) -> tuple[LoadedModel, list[str]]:
    """The model of model.path, frozen, in slices over `dp_shard` of the mesh, all of whose processes must call it; and
    which of its weights are not finite, wherever they lie.

    Each process reads its own slices of the files, or the whole model before it is divided, where it must."""
    blank = load_blank(recipe, device, dtype)
    if isinstance(blank, LoadedModel):
        model = blank.model
        numbers = sum(parameter.numel() for parameter in model.parameters())
        shard_frozen(model, mesh, dtype)
        loaded, broken = filled(blank, numbers, device, console, is_offloaded=False)
    else:
        console.say(f"teacher: each process reads all of it before it is divided, since {blank}")
        loaded = load_model(recipe, device, dtype, lengths=lengths, is_trained=False)
        shard_frozen(loaded.model, mesh, dtype)
        broken = broken_pieces(loaded.model)
    found = torch.tensor(len(broken))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.get_group("dp_shard"))
    if found:
        return loaded, broken or ["Slices that other processes read have numbers that are not finite."]
    if loaded.attention:
        return loaded, []
    return looked_at(loaded, recipe.model.attention, lengths, device, dtype, mesh.get_group("dp_shard")), []
