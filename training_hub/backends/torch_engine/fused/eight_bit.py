"""Matrix products in 8-bit floating point (e4m3) on GPUs that multiply it: forward, and the gradient of the input.

Each row of a matrix has a scale of its own, made from its largest number, so that a token's result does not depend on
the tokens it is packed with. The gradient of the weight stays a product of 16-bit numbers: it is summed over thousands
of tokens, and what is lost there is lost for good. Format: Micikevicius et al. 2022, arXiv:2209.05433; scales by row as
in torch's `_scaled_mm`.
"""

# T tokens, K numbers in, N numbers out

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused.products import add_to_gradient, holder_of
from training_hub.backends.torch_engine.fused.wanted import wanted

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""

MULTIPLE = 16
"""Sides of matrices that tensor cores take."""

OLDEST = (8, 9)
"""Compute capability of the first GPUs that multiply it."""


def problem_on(device: torch.device) -> str | None:
    """Why this device cannot multiply 8-bit numbers, with the remedy; None where it can."""
    remedy = "Set training.fp8 to false"
    if device.type != "cuda":
        return f"training.fp8: 8-bit products need a CUDA device, this run is on {device.type}. {remedy}."
    if torch.cuda.get_device_capability(device) < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"training.fp8: needs a GPU of compute capability 8.9 or newer, this one has {found}. {remedy}."
    return None


def fits(weight: Tensor) -> bool:
    """Whether both sides of the matrix are such that it can be multiplied in 8 bits."""
    return weight.dim() == 2 and all(side % MULTIPLE == 0 for side in weight.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K] transposed + bias [N], to the 3 bits of mantissa of e4m3: [..., N]."""
    result: Tensor = _EightBitLinear.apply(x, weight, bias)
    return result


class _EightBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = multiply(quantize_rows(x.reshape(-1, x.shape[-1])), weight, bias)
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        upstream_TN = upstream[0].reshape(-1, weight.shape[0])
        needs_x, needs_weight, needs_bias = wanted(ctx)
        of_x = of_input(upstream_TN, weight).view(x.shape) if needs_x else None
        of_bias = upstream_TN.sum(0) if needs_bias else None
        x_TK = x.reshape(-1, weight.shape[1])
        if not needs_weight:
            return of_x, None, of_bias
        if holder_of(weight) is None:
            return of_x, upstream_TN.T @ x_TK, of_bias
        add_to_gradient(weight, upstream_TN.T, x_TK)
        return of_x, None, of_bias


def multiply(low_TK: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, N] in the format of weight [N, K]: x @ weight transposed + bias, of the rows of x as `quantize_rows` made
    them. Without a gradient."""
    low_NK, scales_N = quantize_rows(weight)
    result = _product(*low_TK, low_NK.T, scales_N, weight.dtype)
    return result if bias is None else result + bias


def of_input(upstream_TN: Tensor, weight: Tensor) -> Tensor:
    """upstream @ weight, without a gradient. The weight's scales belong to the sum over N here, so upstream takes them
    before its own."""
    low_NK, scales_N = quantize_rows(weight)
    low_TN, scales_T = quantize_rows(upstream_TN, scales_N)
    ones_K = torch.ones_like(scales_N[:1]).expand(weight.shape[1]).contiguous()
    return _product(low_TN, scales_T, transposed(low_NK).T, ones_K, upstream_TN.dtype)


def quantize_rows(numbers_RC: Tensor, factors_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[R, C] in e4m3, and float32 scales [R] by which its rows are numbers * factors. A row of zeros has scale 1."""
    if numbers_RC.is_cuda:
        from training_hub.backends.torch_engine.fused import triton_eight_bit

        return triton_eight_bit.quantize_rows(numbers_RC.contiguous(), factors_C)
    exact_RC = numbers_RC.float() if factors_C is None else numbers_RC.float() * factors_C
    most_R = exact_RC.abs().amax(1)
    scales_R = torch.where(most_R > 0, most_R / LARGEST, 1.0)
    return (exact_RC / scales_R[:, None]).to(FORMAT), scales_R


def transposed(low_NK: Tensor) -> Tensor:
    """[K, N], contiguous."""
    if low_NK.is_cuda:
        from training_hub.backends.torch_engine.fused import triton_eight_bit

        return triton_eight_bit.transposed(low_NK)
    return low_NK.T.contiguous()


def _product(low_TK: Tensor, scales_T: Tensor, low_KN: Tensor, scales_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(low * scales) @ (low * scales) as `dtype`; the second matrix lies column by column."""
    if not low_TK.is_cuda:
        return ((low_TK.float() * scales_T[:, None]) @ (low_KN.float() * scales_N[None])).to(dtype)
    return torch._scaled_mm(low_TK, low_KN, scale_a=scales_T[:, None], scale_b=scales_N[None], out_dtype=dtype)
