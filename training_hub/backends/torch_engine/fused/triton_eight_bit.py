"""Numbers to e4m3 by rows, and matrices of e4m3 turned, in Triton. Imported only where Triton is."""

# R rows, C columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)  # of e4m3
COLUMNS = 4096
SIDE = 64


def quantize_rows(numbers_RC: Tensor, factors_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """As eight_bit.quantize_rows; `numbers_RC` is contiguous."""
    rows, columns = numbers_RC.shape
    low = torch.empty_like(numbers_RC, dtype=torch.float8_e4m3fn)
    scales = numbers_RC.new_empty(rows, dtype=torch.float32)
    block = min(COLUMNS, triton.next_power_of_2(columns))
    given = scales if factors_C is None else factors_C
    _quantize[(rows,)](numbers_RC, given, low, scales, columns, factors_C is not None, block, num_warps=8)
    return low, scales


def transposed(low_RC: Tensor) -> Tensor:
    """[C, R] of a contiguous matrix of bytes."""
    rows, columns = low_RC.shape
    turned = low_RC.new_empty(columns, rows)
    grid = (triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE))
    _turn[grid](low_RC.view(torch.uint8), turned.view(torch.uint8), rows, columns, SIDE)
    return turned


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    numbers, factors, low, scales, columns: tl.constexpr, HAS_FACTORS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    numbers += row * columns
    low += row * columns
    column = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        found = tl.load(numbers + start + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            found = found * tl.load(factors + start + column, mask=inside, other=0.0)
        most = tl.maximum(most, tl.abs(found))
    highest = tl.max(most, 0)
    scale = tl.where(highest > 0.0, highest / LARGEST, 1.0)
    tl.store(scales + row, scale)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        found = tl.load(numbers + start + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            found = found * tl.load(factors + start + column, mask=inside, other=0.0)
        tl.store(low + start + column, (found / scale).to(tl.float8e4nv), mask=inside)


@triton.jit
def _turn(low, turned, rows, columns, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(low + row[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(turned + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))
