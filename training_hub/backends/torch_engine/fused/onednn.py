"""Products of float32 matrices by oneDNN, on processors on which MKL, which torch asks for them, is slow.

They are made here where our own kernel (panels.py), which is faster still, has not been built.

MKL chooses its kernels by the processor's maker. On an AMD EPYC with AVX512 it multiplies at 105 GFLOP/s on one thread
and 180 to 215 on two, oneDNN at 230 and 440 to 490. torch gives 16-bit products to oneDNN, float32 ones only in graphs
that it compiles, by an operation of its own: `mkldnn::_linear_pointwise`, which nobody has promised to keep. So it is
called only where it is there and gives what torch's own product gives. The processor and the shapes decide, never a
clock: a resumed run must multiply as the one before did.
"""

# T, K, N: sides of a product [T, K] @ [K, N]

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.processor import is_slow_for_mkl

LEAST_SIDE, LEAST_PRODUCTS = 16, 2**22
"""Smaller matrices are left to MKL. An AMD EPYC, one thread: both take about as long for a million products of numbers;
from 4 million on oneDNN is 1.3 to 1.8 times as fast (in the gradient of a narrow weight, no faster), from 32 million on
1.4 to 2.4 times."""

ROUNDING = 1e-5
"""Share of the largest number by which two products of float32 may differ: measured 2e-7."""


def multiply(left_TK: Tensor, right_KN: Tensor) -> Tensor:
    """[T, N]: left @ right, in the faster of the two ways; without a gradient where that is oneDNN's."""
    return _by_onednn(left_TK, right_KN) if pays(left_TK, right_KN) else left_TK @ right_KN


def pays(left_TK: Tensor, right_KN: Tensor) -> bool:
    """Whether oneDNN is the faster way to multiply these."""
    if left_TK.dtype != torch.float32 or right_KN.dtype != torch.float32 or left_TK.device.type != "cpu":
        return False
    (rows, inner), columns = left_TK.shape, right_KN.shape[1]
    is_large = min(rows, inner, columns) >= LEAST_SIDE and rows * inner * columns >= LEAST_PRODUCTS
    return is_large and _is_plain(left_TK) and _is_plain(right_KN) and is_trusted()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


@cache
def is_trusted() -> bool:
    """Whether float32 products go to oneDNN here: MKL is slow, and torch's operation is there and right."""
    return is_slow_for_mkl() and problem() is None


@cache
def problem() -> str | None:
    """Why torch's operation cannot be used; None where it gives what torch's product gives, laid out in any way."""
    if _operation() is None:
        return f"torch {torch.__version__} has no mkldnn::_linear_pointwise"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in ((96, 80), (80, 112)))
    wanted = left @ right
    for one in (left, left.T.contiguous().T):
        for other in (right, right.T.contiguous().T):
            try:
                found = _by_onednn(one, other)
            except (RuntimeError, TypeError) as error:
                return f"mkldnn::_linear_pointwise of torch {torch.__version__} fails: {str(error).splitlines()[0]}"
            if found.shape != wanted.shape or float((found - wanted).abs().max() / wanted.abs().max()) > ROUNDING:
                return (
                    f"mkldnn::_linear_pointwise of torch {torch.__version__} gives other numbers than torch's product"
                )
    return None


def note() -> str | None:
    """What a user should be told where products could be faster and are not."""
    reason = problem() if is_slow_for_mkl() else None
    return f"float32 products run through MKL, which is slow on this processor: {reason}" if reason else None


def _operation() -> Any:
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


def _by_onednn(left_TK: Tensor, right_KN: Tensor) -> Tensor:
    found: Tensor = _operation()(left_TK, right_KN.T, None, "none", [], "")
    return found
