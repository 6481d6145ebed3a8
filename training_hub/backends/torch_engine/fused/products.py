"""Matrix products whose gradient of the weight goes straight into the float32 sum that the optimizer reads.

By themselves a 16-bit weight's gradient is made in 16 bits, widened, and added: on a GPU 14 bytes of traffic for each
weight and pack, and one rounding, beside the product. cuBLAS adds a product of 16-bit numbers to a float32 matrix in
one kernel. The same is Megatron-LM's "gradient accumulation fusion" (Shoeybi et al. 2019, arXiv:1909.08053, its code).
"""

# T tokens, K numbers in, N numbers out

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear

from training_hub.backends.torch_engine.fused import onednn

HOLDER = "training_hub_gradient_holder"
"""Attribute of a parameter: the tensor whose `grad` is the float32 sum of its gradients over the packs of a step."""


def hold_gradient(parameter: nn.Parameter, holder: Tensor) -> None:
    """From now on products may add the gradient of `parameter` to `holder.grad` themselves."""
    setattr(parameter, HOLDER, holder)


def release_gradient(parameter: nn.Parameter) -> None:
    """Undo `hold_gradient`."""
    if hasattr(parameter, HOLDER):
        delattr(parameter, HOLDER)


def holder_of(parameter: Tensor) -> Tensor | None:
    """Where the gradient of `parameter` is added up; None where only autograd may do that."""
    holder: Tensor | None = getattr(parameter, HOLDER, None)
    return holder if holder is not None and parameter.requires_grad else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K] transposed + bias [N]: [..., N].

    Where the weight has a holder, backward adds to that and gives autograd no gradient of the weight.
    """
    if holder_of(weight) is None or not torch.is_grad_enabled():
        fast = onednn.linear(x, weight, bias)
        return plain_linear(x, weight, bias) if fast is None else fast
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        upstream_TN = upstream[0].reshape(-1, weight.shape[0])
        add_to_gradient(weight, upstream_TN.T, x.reshape(-1, weight.shape[1]))
        of_x = (upstream_TN @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, upstream_TN.sum(0) if ctx.needs_input_grad[2] else None


def add_to_gradient(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the gradient sum of `weight`, which has a holder."""
    holder = holder_of(weight)
    assert holder is not None  # the caller has asked
    if holder.grad is None:
        holder.grad = product(left, right)
    else:
        add_product_(holder.grad, left, right)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32. CUDA multiplies 16-bit numbers straight into it; a CPU rounds the product once."""
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return onednn.multiply(left, right).to(torch.promote_types(left.dtype, torch.float32))


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is in their own format or in float32."""
    if total.dtype == left.dtype and not onednn.pays(left, right):
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(left, right))
