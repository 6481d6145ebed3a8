"""Products of whole matrices by our own kernel (panels.c), on processors for which no library's is as fast.

On a core of an AMD EPYC (Zen 5), which can do 538 GFLOP/s in bfloat16 and 271 in float32, oneDNN reaches 380 to 470 and
170 to 245 in the products of a small model's step, the kernel 400 to 505 and 180 to 250, and it adds the gradient of a
16-bit weight to a float32 sum by itself. The processor and the shapes decide, never a clock: a resumed run must
multiply as the one before did.
"""

# T, K, N: sides of a product [T, K] @ [K, N]

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.processor import is_slow_for_mkl

LEAST_SIDE, LEAST_PRODUCTS = 16, 2**22
"""Smaller matrices are left to torch."""

LANES = 16
"""Of N this is a factor."""

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Share of the largest number by which two products may differ: measured 2e-7, and one rounding to bfloat16, 4e-3."""


class _Matrix(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("stride", ctypes.c_long), ("turned", ctypes.c_int))


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("left", "right")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("rows", "columns", "inner")),
        *((name, ctypes.c_int) for name in ("low", "wide", "add")),
    )


def pays(left_TK: Tensor, right_KN: Tensor) -> bool:
    """Whether the kernel takes these, and is the faster way to multiply them."""
    kind = left_TK.dtype
    if kind != right_KN.dtype or not (_is_plain(left_TK) and _is_plain(right_KN)) or not is_trusted(kind):
        return False
    (rows, inner), columns = left_TK.shape, right_KN.shape[1]
    is_large = min(rows, inner, columns) >= LEAST_SIDE and rows * inner * columns >= LEAST_PRODUCTS
    return is_large and columns % LANES == 0 and _lies_well(left_TK, 1) and _lies_well(right_KN, 0)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def _lies_well(tensor: Tensor, inner: int) -> bool:
    """Whether one side is contiguous, and where bfloat16 lies along `inner`, which is summed over, in whole pairs."""
    dense = 1 if tensor.stride(1) == 1 else 0
    stride = tensor.stride(1 - dense)
    if tensor.stride(dense) != 1 or stride < tensor.shape[dense]:
        return False
    return dense != inner or tensor.dtype == torch.float32 or not (stride % 2 or tensor.shape[inner] % 2)


@cache
def is_trusted(dtype: torch.dtype) -> bool:
    """Whether products of this format go to the kernel here: no library is faster, and it is there and right."""
    if dtype not in ROUNDING or not is_slow_for_mkl():
        return False
    if dtype == torch.bfloat16 and (torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported()):
        return False
    return problem(dtype) is None


@cache
def problem(dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used; None where it gives what torch's product gives, laid out in any way."""
    if kernels() is None:
        return "it is not built"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).to(dtype) for size in ((83, 74), (74, 112)))
    wanted = left.float() @ right.float()
    for one in (left, left.T.contiguous().T):
        for other in (right, right.T.contiguous().T):
            found = torch.empty_like(wanted, dtype=dtype)
            if _multiply(found, one, other, adds=False):
                return "this processor, or the compiler, lacks its instructions"
            if float((found.float() - wanted).abs().max() / wanted.abs().max()) > ROUNDING[dtype]:
                return "it gives other numbers than torch's product"
    return None


def multiply(left_TK: Tensor, right_KN: Tensor) -> Tensor:
    """[T, N]: left @ right, without a gradient."""
    _define()
    made: Tensor = torch.ops.training_hub.mm(left_TK, right_KN)
    return made


def multiply_into_(out_TN: Tensor, left_TK: Tensor, right_KN: Tensor, *, adds: bool = False) -> None:
    """Let `out`, contiguous, in their format or float32, be left @ right; adds: in float32, add that to it."""
    _define()
    torch.ops.training_hub.mm_(out_TN, left_TK, right_KN, adds)


@cache
def _define() -> torch.library.Library:
    """The kernel as operations of torch's, which its profiler and selective checkpointing see; there while this is."""
    library = torch.library.Library("training_hub", "FRAGMENT")
    library.define("mm(Tensor left, Tensor right) -> Tensor")
    library.define("mm_(Tensor(a!) out, Tensor left, Tensor right, bool adds) -> ()")
    library.impl("mm", _mm, "CPU")
    library.impl("mm_", _mm_, "CPU")
    return library


def _mm(left_TK: Tensor, right_KN: Tensor) -> Tensor:
    made = left_TK.new_empty(len(left_TK), right_KN.shape[1])
    _mm_(made, left_TK, right_KN, adds=False)
    return made


def _mm_(out_TN: Tensor, left_TK: Tensor, right_KN: Tensor, adds: bool) -> None:
    if _multiply(out_TN, left_TK, right_KN, adds=adds):
        raise torch.OutOfMemoryError("matrix product: can't allocate memory for a copy of its right side")


def _multiply(out_TN: Tensor, left_TK: Tensor, right_KN: Tensor, *, adds: bool) -> int:
    library = kernels()
    assert library is not None  # the caller has asked
    (rows, inner), columns = left_TK.shape, right_KN.shape[1]
    formats = (left_TK.dtype == torch.bfloat16, out_TN.dtype == torch.float32, adds)
    product = _Product(_matrix(left_TK), _matrix(right_KN), out_TN.data_ptr(), rows, columns, inner, *formats)
    failed: int = library.multiply(ctypes.byref(product), torch.get_num_threads())
    return failed


def _matrix(tensor: Tensor) -> _Matrix:
    is_turned = tensor.stride(1) != 1
    return _Matrix(tensor.data_ptr(), tensor.stride(1 if is_turned else 0), is_turned)
