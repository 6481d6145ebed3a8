"""What the torch that is installed can do for a divided model, found by trying it on a few numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def can_slice_bytes(mesh: DeviceMesh) -> bool:
    """Whether weights that are no floating-point numbers, as quantised ones, can lie in slices; all processes of the
    mesh must ask. torch 2.11 cannot: it makes each slice a weight that trains, if only for a moment."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(mesh.size(), dtype=torch.uint8), requires_grad=False)
    try:
        fully_shard(module, mesh=mesh)
    except RuntimeError:
        return False
    return True


@cache
def can_split_backward() -> bool:
    """Whether gradients of weights that are made apart from those of activations are those that backward makes, for a
    function with two results. In torch 2.11 they are not: it sums what has come to both and gives that to the first."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    x: Any = torch.tensor([2.0], requires_grad=True)
    weight: Any = torch.tensor([3.0], requires_grad=True)
    with torch.enable_grad():
        product, total = _ProductAndSum.apply(x, weight)
        try:
            _, groups = stage_backward_input([5 * product + 7 * total], [torch.ones(1)], [x], iter([weight]))
            stage_backward_weight(iter([weight]), groups)
        except RuntimeError:
            return False
    return weight.grad is not None and weight.grad.item() == 5 * 2 + 7


class _ProductAndSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight, x + weight

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_product, of_sum = upstream
        return of_product * weight + of_sum, of_product * x + of_sum
