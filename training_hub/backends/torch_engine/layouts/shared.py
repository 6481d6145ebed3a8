"""What split modules share: a forward of their own, over this rank's parts of weights, and a weight's own rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.fused.exchange import Forward, OnKernels, made


def exchange(model: nn.Module, name: str, module: nn.Module, make: Callable[[Any], Forward]) -> None:
    """Let the module of this name run the forward that `make` makes for its class, in place. It stays so: with parts of
    weights the library's own forward says something else."""
    own: Any = type(module)
    own = own.__bases__[1] if issubclass(own, OnKernels) else own
    model.set_submodule(name, made(_subclass(own, make), module.__dict__))


@cache
def _subclass(own: Any, make: Callable[[Any], Forward]) -> type:
    return type(own.__name__, (own,), {"forward": make(own)})


def locally(own: type, module: nn.Module, **changes: Any) -> Any:
    """The module as one of its library's class `own` whose weights are this rank's parts, for one call of its forward.

    changes: attributes that are others for the parts.
    """
    weights = {key: None if one is None else own_part(one) for key, one in module._parameters.items()}
    return made(own, {**module.__dict__, "_parameters": weights, **changes})


def own_part(weight: Tensor) -> Tensor:
    """This rank's part of a weight, whose gradient is that of the weight; `weight` itself where it is not split."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True)
class Rows:
    """The rows `start` to `end` of `total` that a rank of `mesh` has of a weight split along its first dimension.

    most: as many as a rank has, but for the last ones.
    """

    mesh: DeviceMesh
    start: int
    end: int
    total: int
    most: int

    @staticmethod
    def of(weight: DTensor) -> Rows:
        """Those of a weight split over one mesh, as torch splits: in equal parts, the last ones shorter or empty."""
        mesh, total = weight.device_mesh, weight.shape[0]
        size = -(-total // mesh.size())
        start = min(mesh.get_local_rank() * size, total)
        return Rows(mesh, start, min(start + size, total), total, size)

    def here(self, numbers: Tensor) -> Tensor:
        """Which of the row numbers are here, as bool."""
        return (numbers >= self.start) & (numbers < self.end)

    def local(self, numbers: Tensor) -> Tensor:
        """The place here of each row number; that of some row where it is not here."""
        return (numbers - self.start).clamp(0, max(self.end - self.start - 1, 0))

    @torch.no_grad()
    def summed_(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, without a gradient; `x` itself is changed."""
        torch.distributed.all_reduce(x, group=self.mesh.get_group())
        return x

    @torch.no_grad()
    def highest_(self, x: Tensor) -> Tensor:
        """The largest of each number of `x` over the ranks; `x` itself is changed."""
        torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX, group=self.mesh.get_group())
        return x
