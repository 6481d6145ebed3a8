"""The elementwise kernels of kernels.c for a GPU, in Triton: same names, same tensors, same numbers.

Each reads its inputs once, computes in float32 and writes its results once. Imported only where Triton is; with
TRITON_INTERPRET=1 they run on a CPU, slowly.
"""

# N rows, D width of a row, T tokens, H heads

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096
"""About as many numbers a program holds at a time."""

WARPS = 8
"""Of a program that holds them: 16 numbers a thread, which are two loads of 16 bytes each."""

LOGITS = 8192
"""Logits of a row that a program of the loss holds at a time."""


def rms_norm_forward(
    x: Tensor, weight: Tensor, result: Tensor, inverse: Tensor, rows: int, width: int, eps: float, offset: float
) -> None:
    """result [N, D] = x * inverse * (weight + offset), inverse [N] = 1 / sqrt(mean(x^2) + eps)."""
    block, tile = _tile(width)
    grid = (triton.cdiv(rows, tile),)
    _norm_forward[grid](x, weight, result, inverse, rows, width, eps, offset, tile, block, num_warps=WARPS)


def add_norm_forward(
    x: Tensor, delta: Tensor, weight: Tensor, total: Tensor, result: Tensor, inverse: Tensor,
    rows: int, width: int, eps: float, offset: float,
) -> None:  # fmt: skip
    """total [N, D] = x + delta, as the tensors are rounded; result and inverse those of its norm."""
    block, tile = _tile(width)
    grid = (triton.cdiv(rows, tile),)
    _add_norm_forward[grid](
        x, delta, weight, total, result, inverse, rows, width, eps, offset, tile, block, num_warps=WARPS
    )


def rms_norm_backward(
    upstream: Tensor, beside: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor,
    result: Tensor, partial: Tensor, rows: int, width: int, offset: float,
) -> None:  # fmt: skip
    """result: the gradient of x, with what of it went around the norm, `beside`. partial [P, D]: that of the
    weight, summed over N / P rows each, of which the next power of two is taken."""
    chunk = triton.next_power_of_2(triton.cdiv(rows, len(partial)))
    block, tile = _tile(width, chunk)
    others = upstream if beside is None else beside
    _norm_backward[(len(partial),)](
        upstream, others, x, weight, inverse, result, partial, rows, width, offset,
        beside is not None, chunk, tile, block, num_warps=WARPS,
    )  # fmt: skip


def swiglu_forward(gate: Tensor, up: Tensor, result: Tensor, count: int) -> None:
    """result = silu(gate) * up."""
    _swiglu_forward[(triton.cdiv(count, NUMBERS),)](gate, up, result, count, NUMBERS)


def swiglu_backward(upstream: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor, count: int) -> None:
    """of_gate, of_up: the gradients of gate and up."""
    _swiglu_backward[(triton.cdiv(count, NUMBERS),)](upstream, gate, up, of_gate, of_up, count, NUMBERS)


def rotate(
    x: Tensor, cosines: Tensor, sines: Tensor, result: Tensor, tokens: int, heads: int, width: int, back: bool
) -> None:
    """x, result [T, H, D]; cosines, sines [T, D]. back: the gradient of x from that of the result."""
    half = width // 2
    block = triton.next_power_of_2(half)
    tile = min(triton.next_power_of_2(heads), max(1, NUMBERS // block))
    grid = (tokens, triton.cdiv(heads, tile))
    _rotate[grid](x, cosines, sines, result, heads, half, back, tile, block)


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, gradient: Tensor,
    rows: int, vocabulary: int, multiplier: float, smoothing: float, z: float, dft: bool,
) -> None:  # fmt: skip
    """losses [R], those of TokenLoss times weights, and the gradient [R, V] of their sum by the logits."""
    block = min(LOGITS, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](
        logits,
        targets,
        weights,
        losses,
        gradient,
        multiplier,
        smoothing,
        z,
        dft,
        vocabulary,
        block,
        num_warps=8 if block > 1024 else 4,
    )


def _tile(width: int, most: int = 64) -> tuple[int, int]:
    """Numbers of a row as a power of two, and rows at a time, also one."""
    block = triton.next_power_of_2(width)
    return block, min(most, max(1, NUMBERS // block))


@triton.jit
def _norm_forward(  # type: ignore[no-untyped-def]
    x, weight, result, inverse, rows, width, eps, offset, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    numbers = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 1) / width + eps)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    normed = numbers * factor[:, None] * scale[None, :]
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=inside)
    tl.store(inverse + row, factor, mask=row < rows)


@triton.jit
def _add_norm_forward(  # type: ignore[no-untyped-def]
    x, delta, weight, total, result, inverse, rows, width, eps, offset, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    numbers = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 1) / width + eps)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    normed = numbers * factor[:, None] * scale[None, :]
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=inside)
    tl.store(inverse + row, factor, mask=row < rows)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    upstream, beside, x, weight, inverse, result, partial, rows, width, offset,
    IS_BESIDE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(CHUNK // TILE):
        row = chunk * CHUNK + step * TILE + tl.arange(0, TILE)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        at = row[:, None] * width + column[None, :]
        factor = tl.load(inverse + row, mask=row < rows, other=0.0)
        shares = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        given = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(given * shares, 0)
        scaled = given * scale[None, :]
        along = tl.sum(scaled * shares, 1) / width
        gradient = (scaled - shares * along[:, None]) * factor[:, None]
        if IS_BESIDE:
            gradient += tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + at, gradient.to(result.dtype.element_ty), mask=inside)
    tl.store(partial + chunk * width + column, total, mask=column < width)


@triton.jit
def _swiglu_forward(gate, up, result, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gates = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    made = gates * tl.sigmoid(gates) * ups
    tl.store(result + at, made.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(upstream, gate, up, of_gate, of_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    given = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gates)
    slope = open_ * (1.0 + gates * (1.0 - open_))
    tl.store(of_gate + at, (given * ups * slope).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + at, (given * gates * open_).to(of_up.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x, cosines, sines, result, heads, half, back: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    known, angle = column < half, token * 2 * half + column
    cos_low = tl.load(cosines + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cosines + angle + half, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sines + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sines + angle + half, mask=known, other=0.0).to(tl.float32)[None, :]
    inside = (head[:, None] < heads) & known[None, :]
    at = (token * heads + head[:, None]) * 2 * half + column[None, :]
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    if back:
        to_low, to_high = high * sin_high, -low * sin_low
    else:
        to_low, to_high = -high * sin_low, low * sin_high
    tl.store(result + at, (low * cos_low + to_low).to(result.dtype.element_ty), mask=inside)
    tl.store(result + at + half, (high * cos_high + to_high).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, weights, losses, gradient, multiplier, smoothing, z,
    DFT: tl.constexpr, vocabulary: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    gradient += row * vocabulary
    column = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):  # each place of the block keeps a maximum and sums of its own
        inside = start + column < vocabulary
        numbers = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32) * multiplier
        plain += numbers
        numbers = tl.where(inside, numbers, -1e38)
        higher = tl.maximum(most, numbers)
        total = total * tl.exp(most - higher) + tl.where(inside, tl.exp(numbers - higher), 0.0)
        most = higher
    highest = tl.max(most, 0)
    normaliser = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    surprise = normaliser - tl.load(logits + target).to(tl.float32) * multiplier
    spread = normaliser - tl.sum(plain, 0) / vocabulary
    if DFT:
        share = tl.exp(-surprise)
    else:
        share = surprise * 0.0 + 1.0
    loss = share * ((1.0 - smoothing) * surprise + smoothing * spread) + z * normaliser * normaliser
    tl.store(losses + row, weight * loss)
    up = weight * multiplier
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        numbers = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32) * multiplier
        slope = (share + 2.0 * z * normaliser) * tl.exp(numbers - normaliser) - share * smoothing / vocabulary
        slope -= tl.where(start + column == target, share * (1.0 - smoothing), 0.0)
        tl.store(gradient + start + column, (up * slope).to(gradient.dtype.element_ty), mask=inside)
