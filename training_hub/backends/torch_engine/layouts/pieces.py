"""A tensor that is divided over processes: this process's piece of it, where that lies, and sums over all pieces."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Cut:
    """Where a piece lies in the whole: `starts` and `sizes` for each dimension of `shape`."""

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True))

    @property
    def is_empty(self) -> bool:
        return math.prod(self.sizes) == 0


def whole_cut(shape: Iterable[int]) -> Cut:
    """The piece that is everything."""
    sizes = tuple(shape)
    return Cut(sizes, (0,) * len(sizes), sizes)


def cut_of(weight: Tensor) -> Cut:
    """Where this process's piece of `weight` lies; all of it where it is not divided."""
    if not isinstance(weight, DTensor):
        return whole_cut(weight.shape)
    sizes, starts = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return Cut(tuple(weight.shape), tuple(starts), tuple(sizes))


@torch.no_grad()
def local_of(weight: Tensor) -> Tensor:
    """This process's piece, in the same memory; `weight` itself where it is not divided."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def cut_like(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight that is divided over processes, divided like it."""
    if not isinstance(gradient, DTensor) or not isinstance(weight, DTensor):
        return gradient
    return gradient.redistribute(placements=weight.placements)


def is_copy(weight: Tensor) -> bool:
    """Whether another process, lower in rank, holds the same piece and speaks for it."""
    if not isinstance(weight, DTensor):
        return False
    places = weight.device_mesh.get_coordinate() or ()
    return any(place > 0 and one.is_replicate() for place, one in zip(places, weight.placements, strict=True))


@torch.no_grad()
def norm_of(
    pieces: Iterable[tuple[Tensor, DTensor | None]],
    device: torch.device,
    beyond: Iterable[dist.ProcessGroup] = (),
    shared: Iterable[DTensor] = (),
) -> Tensor:
    """The norm of all gradients together, the same in each process, as a float32 scalar (float64 of such).

    pieces: this process's piece of each gradient, and the weight it is of, where that is divided. Each dimension of the
    mesh over which a weight is cut adds up its squares once; over the others the pieces are the same. beyond: groups
    whose other processes have pieces of other weights. shared: weights over whose processes some may have gradients of
    which this one has no piece.
    """
    sums: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for one in shared:
        exact = torch.promote_types(one.dtype, torch.float32)
        sums.setdefault(groups_across(one), torch.zeros((), dtype=exact, device=device))
    for gradient, weight in pieces:
        exact = torch.promote_types(gradient.dtype, torch.float32)
        square = gradient.detach().to(exact).square().sum().to(device)
        key = groups_across(weight)
        sums[key] = sums[key] + square if key in sums else square
    for groups, total in sums.items():
        for group in groups:
            dist.all_reduce(total, group=group)
    whole = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), device=device)
    for group in beyond:
        dist.all_reduce(whole, group=group)
    return whole.sqrt()


def groups_across(weight: DTensor | None) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes over which the pieces of a weight lie, one for each dimension that cuts it."""
    if weight is None:
        return ()
    mesh = weight.device_mesh
    return tuple(mesh.get_group(number) for number, one in enumerate(weight.placements) if not one.is_replicate())


@torch.no_grad()
def whole_of(piece: Tensor, weight: Tensor) -> Tensor:
    """The whole of which `piece` is this process's piece, cut as `weight` is; each process gets it, and must ask.

    Not DTensor.full_tensor: what torch 2.13 gives there of uneven pieces on CPUs lies in memory that is given away
    again (rows of a 7 x 32 matrix over 2 processes came back as noise).
    """
    groups = groups_across(weight if isinstance(weight, DTensor) else None)
    if not groups:
        return piece
    own = cut_of(weight)
    room = torch.tensor([piece.numel()], device=piece.device)
    for group in groups:
        dist.all_reduce(room, op=dist.ReduceOp.MAX, group=group)
    numbers = piece.new_zeros(1, int(room))
    numbers[0, : piece.numel()] = piece.reshape(-1)
    places = torch.tensor([[*own.starts, *own.sizes]], device=piece.device)
    for group in groups:
        numbers, places = _gathered(numbers, group), _gathered(places, group)
    whole = piece.new_empty(own.shape)
    for row, place in zip(numbers, places.tolist(), strict=True):
        cut = Cut(own.shape, tuple(place[: len(own.shape)]), tuple(place[len(own.shape) :]))
        whole[cut.slices] = row[: math.prod(cut.sizes)].view(cut.sizes)
    return whole


def _gathered(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes of the group, one below the other."""
    found = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(found, rows.contiguous(), group=group)
    return torch.cat(found)
