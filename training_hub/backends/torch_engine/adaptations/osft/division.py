"""What is made of the targets of a run that is divided over its processes: who decomposes each, who keeps what trains.

Decompositions are shared out by what they cost, over all processes that have the same layers. Where weights lie in
slices, what trains in one, and all that is kept for it, lies in one of the processes that have its slices, which also
moves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.targets import Target
from training_hub.backends.torch_engine.layouts import Layout
from training_hub.backends.torch_engine.layouts.owners import Dealt

SLICES = ("dp_shard", "efsdp")
"""Dimensions of a mesh along which a weight is kept in slices of float32, of which none is wanted elsewhere."""


def collected(
    mine: dict[str, Split], targets: Sequence[Target], layout: Layout, dealt: Dealt | None = None
) -> dict[str, Split]:
    """The splits of all `targets` of this process, from the one that made each among those with the same layers; the
    same bits in all of these, but of parameters that are `dealt` only those of this process's own. What is `mine` is
    taken away. All processes of the run must call it."""
    if layout.group.world_size == 1:
        return mine
    shapes = {name: {key: list(t.shape) for key, t in one.tensors().items()} for name, one in mine.items()}
    known = {name: each for said in layout.group.gather(shapes) for name, each in said.items()}
    elsewhere = dealt.names - dealt.mine if dealt is not None else frozenset()
    found, device = {}, layout.device
    for target in targets:
        dtype = torch.float64 if target.parameter.dtype == torch.float64 else torch.float32
        own = mine.pop(target.name).tensors() if target.name in mine else {}
        parts = {}
        for field in fields(Split):
            # Of a sum in which all but one are 0, every bit is that one's.
            part = own.get(field.name)
            part = part if part is not None else torch.zeros(known[target.name][field.name], dtype=dtype, device=device)
            summed = layout.sum_alike(part) if part.numel() else part
            if target.parameter_name not in elsewhere:
                parts[field.name] = summed
        if parts:
            found[target.name] = Split(**parts)
    return found


def dealt_over(parameters: Mapping[str, nn.Parameter], layout: Layout) -> Dealt:
    """Who keeps what trains in each of these parameters of a divided model, as far as they lie in slices. All processes
    with the same layers must call it."""
    sliced = {name: one for name, one in parameters.items() if isinstance(one, DTensor) and _is_sliced(one)}
    kind = next((one.dtype for one in sliced.values()), torch.float32)
    return Dealt(sliced, torch.empty(0, dtype=kind, device=layout.device), layout.stage)


def _is_sliced(weight: DTensor) -> bool:
    names = weight.device_mesh.mesh_dim_names or ()
    placed = zip(names, weight.placements, strict=True)
    return any(name in SLICES and not one.is_replicate() for name, one in placed)


@torch.no_grad()
def over_all(numbers: Tensor, *, is_highest: bool = False) -> Tensor:
    """The sum over all processes of the run, or the highest; the tensor itself is changed."""
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX if is_highest else dist.ReduceOp.SUM)
    return numbers
