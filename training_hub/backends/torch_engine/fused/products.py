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

from training_hub.backends.torch_engine.fused import onednn, panels
from training_hub.backends.torch_engine.fused.wanted import wanted

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
    is_held = holder_of(weight) is not None and torch.is_grad_enabled()
    if not (is_held or is_faster(x, weight)):
        return plain_linear(x, weight, bias)
    # Its shape is given back out here: autograd lets nobody add to a view that a function of ours returns.
    result: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
    return result


def is_faster(x: Tensor, weight_NK: Tensor) -> bool:
    """Whether another way than torch's is the faster one to multiply x [..., K] by this weight."""
    if not x.is_cpu or type(x) not in (Tensor, nn.Parameter):  # its rows may lie over processes
        return False
    x_TK = x.reshape(-1, x.shape[-1])
    return panels.pays(x_TK, weight_NK.T) or onednn.pays(x_TK, weight_NK.T)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        if not is_faster(x_TK, weight_NK):
            return plain_linear(x_TK, weight_NK, bias_N)
        y_TN = multiply(x_TK, weight_NK.T)
        return y_TN if bias_N is None else y_TN + bias_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        (upstream_TN,) = upstream
        of_x, of_weight, of_bias = wanted(ctx)
        is_held = holder_of(weight_NK) is not None
        if of_weight and is_held:
            add_to_gradient(weight_NK, upstream_TN.T, x_TK)
        return (
            multiply(upstream_TN, weight_NK) if of_x else None,
            multiply(upstream_TN.T, x_TK) if of_weight and not is_held else None,
            upstream_TN.sum(0) if of_bias else None,
        )


def multiply(left_TK: Tensor, right_KN: Tensor) -> Tensor:
    """[T, N]: left @ right in their format, in the fastest way; without a gradient where that is not torch's."""
    return panels.multiply(left_TK, right_KN) if panels.pays(left_TK, right_KN) else onednn.multiply(left_TK, right_KN)


def multiply_into_(out_TN: Tensor, left_TK: Tensor, right_KN: Tensor) -> None:
    """The same, written into `out`, contiguous and in their format."""
    if panels.pays(left_TK, right_KN):
        panels.multiply_into_(out_TN, left_TK, right_KN)
    elif onednn.pays(left_TK, right_KN):
        out_TN.copy_(onednn.multiply(left_TK, right_KN))
    else:
        torch.mm(left_TK, right_KN, out=out_TN)


def add_to_gradient(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the gradient sum of `weight`, which has a holder."""
    holder = holder_of(weight)
    assert holder is not None  # the caller has asked
    if holder.grad is None:
        holder.grad = product(left, right)
    else:
        add_product_(holder.grad, left, right)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32. CUDA and our kernel multiply 16-bit numbers straight into it; else they are rounded."""
    if left.is_cuda and left.element_size() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.bfloat16 and panels.pays(left, right):
        made = left.new_empty(len(left), right.shape[1], dtype=torch.float32)
        panels.multiply_into_(made, left, right)
        return made
    return multiply(left, right).to(torch.promote_types(left.dtype, torch.float32))


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is in their own format or in float32."""
    if total.is_cpu and total.dtype == torch.float32 and total.is_contiguous() and panels.pays(left, right):
        panels.multiply_into_(total, left, right, adds=True)
    elif total.dtype == left.dtype and not onednn.pays(left, right):
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(left, right))
