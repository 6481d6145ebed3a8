"""What the ranks of a group say to each other within a pass, each exchange with what it means for gradients.

A tensor between split products is the same on all ranks, a part on each, or a summand on each. Its gradient is the same
where the tensor is, a part where it is one, and a summand where all ranks read the same and work on parts of their own.
Source: Shoeybi et al. 2019, arXiv:1909.08053 (entering, leaving); Korthikanti et al. 2022, arXiv:2205.05198 (slices).
"""

# B rows of a batch, T tokens, L tokens of one rank, x any width

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

TOKENS, WIDTH = -2, -1
"""Dimensions along which tensors are cut."""

Way = Callable[[Tensor], Tensor]

gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""What torch has called so since 2.13."""


class _Exchange(torch.autograd.Function):
    """`ahead` of a tensor, and `back` of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Way, back: Way) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(upstream[0]), None, None


def _exchanged(x: Tensor, ahead: Way, back: Way) -> Tensor:
    result: Tensor = _Exchange.apply(x, ahead, back)
    return result


def entering(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x`, the same on all ranks of the mesh, for work that is split among them: its gradients are added up."""
    return _exchanged(x, _same, partial(_summed, mesh=mesh))


def leaving(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of `x` over the ranks of the mesh, whose gradient is the same on all of them."""
    return _exchanged(x, partial(_summed, mesh=mesh), _same)


def joined(x: Tensor, mesh: DeviceMesh, dim: int, length: int | None = None) -> Tensor:
    """[..., length, ...] from the parts [..., L, ...] of all ranks, for work that all do alike."""
    length = x.shape[dim] * mesh.size() if length is None else length
    return _exchanged(x, partial(gathered, mesh=mesh, dim=dim, length=length), partial(_part, mesh=mesh, dim=dim))


def parted(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's part of `x`, which is the same on all ranks. Parts are equally long, with zeros behind the end."""
    length = x.shape[dim]
    return _exchanged(x, partial(_part, mesh=mesh, dim=dim), partial(gathered, mesh=mesh, dim=dim, length=length))


def entering_joined(x: Tensor, mesh: DeviceMesh, dim: int, length: int | None = None) -> Tensor:
    """As `joined`, for work that is split among the ranks."""
    length = x.shape[dim] * mesh.size() if length is None else length
    return _exchanged(x, partial(gathered, mesh=mesh, dim=dim, length=length), partial(_scattered, mesh=mesh, dim=dim))


def leaving_parted(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's part of the sum of `x` over the ranks."""
    length = x.shape[dim]
    return _exchanged(x, partial(_scattered, mesh=mesh, dim=dim), partial(gathered, mesh=mesh, dim=dim, length=length))


def least(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The least of each number of `x` over the ranks of the mesh, without a gradient; `x` itself is changed."""
    dist.all_reduce(x, op=dist.ReduceOp.MIN, group=mesh.get_group())
    return x


def _same(x: Tensor) -> Tensor:
    return x


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh.get_group())
    return total


def gathered(x: Tensor, mesh: DeviceMesh, dim: int, length: int) -> Tensor:
    """[..., length, ...] from the parts of all ranks, without a gradient."""
    parts = x.new_empty(mesh.size(), *x.shape)
    gather_single(parts, x.contiguous()[None], group=mesh.get_group())
    whole = parts.movedim(0, dim + x.dim()).flatten(dim - 1, dim)
    return whole.narrow(dim, 0, length).contiguous()


def _part(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    total = x.shape[dim]
    size = -(-total // mesh.size())
    start = min(mesh.get_local_rank() * size, total)
    own = x.narrow(dim, start, min(size, total - start))
    # A copy: what it is cut from need not be kept for it.
    return _padded(own, dim, size).clone(memory_format=torch.contiguous_format)


def _scattered(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    size = -(-x.shape[dim] // mesh.size())
    parts = _padded(x, dim, size * mesh.size()).unflatten(dim, (mesh.size(), size)).movedim(dim - 1, 0).contiguous()
    own = torch.empty_like(parts[0])
    scatter_single(own[None], parts, group=mesh.get_group())
    return own


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    behind = list(x.shape)
    behind[dim] = missing
    return torch.cat([x, x.new_zeros(behind)], dim)
