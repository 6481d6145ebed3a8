"""The step of CompactAdamW in one pass over memory, for a GPU, in Triton.

The operations of torch that do the same read and write about 230 bytes for each 8-bit weight, this 16. Imported only
where Triton is; with TRITON_INTERPRET=1 it runs on a CPU, slowly.
"""

# G blocks of a program

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(256)  # as in blocks.py
GROUP = 8
"""Blocks that a program moves at a time."""


def adamw_(
    weight: Tensor,
    extra: Tensor | None,
    gradient: Tensor,
    state: dict[str, Tensor],
    tables: tuple[Tensor, ...],
    rate: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    corrections: tuple[float, float],
) -> None:
    """Move a weight, its extra bits and its moments by one step, in place. All are contiguous; gradient is float32.

    tables: values and borders of the signed code, then of the other. corrections: 1 - beta1^step and the root of
    1 - beta2^step.
    """
    is_8bit = "exp_avg_scale" in state
    scales = [state[f"{name}_scale"] if is_8bit else gradient for name in ("exp_avg", "exp_avg_sq")]
    _step[(triton.cdiv(weight.numel(), GROUP * BLOCK.value),)](
        weight if extra is None else weight.view(extra.dtype), weight if extra is None else extra, gradient,
        state["exp_avg"], scales[0], state["exp_avg_sq"], scales[1], *tables,
        weight.numel(), rate * decay, betas[0], betas[1], eps, rate / corrections[0], corrections[1],
        extra is not None, is_8bit, GROUP,
    )  # fmt: skip


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    weight, extra, gradient, mean, mean_scale, square, square_scale,
    signed_values, signed_borders, values, borders,
    count, shrink, beta1, beta2, eps, stride, root,
    IS_SPLIT: tl.constexpr, IS_8BIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    is_block = block * BLOCK < count
    is_held = is_block[:, None] & (at >= 0)  # bytes are there for the whole of the last block
    if IS_SPLIT:
        high = tl.load(weight + at, mask=inside, other=0).to(tl.int32) << 16
        number = (high + tl.load(extra + at, mask=inside, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        number = tl.load(weight + at, mask=inside, other=0.0)
    slope = tl.load(gradient + at, mask=inside, other=0.0)
    if IS_8BIT:
        code_1 = tl.load(mean + at, mask=is_held, other=0).to(tl.int32)
        code_2 = tl.load(square + at, mask=is_held, other=0).to(tl.int32)
        m = tl.load(signed_values + code_1) * tl.load(mean_scale + block, mask=is_block, other=0.0)[:, None]
        v = tl.load(values + code_2) * tl.load(square_scale + block, mask=is_block, other=0.0)[:, None]
    else:
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
    number = number - shrink * number
    m = m + (1.0 - beta1) * (slope - m)
    v = beta2 * v + (1.0 - beta2) * slope * slope
    number = number - stride * m / (tl.sqrt(v) / root + eps)
    if IS_SPLIT:
        bits = number.to(tl.int32, bitcast=True)
        rounded = (bits + 0x8000) >> 16
        tl.store(weight + at, rounded.to(tl.int16), mask=inside)
        tl.store(extra + at, (bits - (rounded << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(weight + at, number, mask=inside)
    if IS_8BIT:
        m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        most_1, most_2 = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(mean_scale + block, most_1, mask=is_block)
        tl.store(square_scale + block, most_2, mask=is_block)
        code_1 = _nearest(m / tl.maximum(most_1, 1.1754943508222875e-38)[:, None], signed_borders, True)
        code_2 = _nearest(v / tl.maximum(most_2, 1.1754943508222875e-38)[:, None], borders, False)
        code_2 = tl.where(v > 0, tl.maximum(code_2, 1), code_2)
        tl.store(mean + at, code_1.to(tl.uint8), mask=is_held)
        tl.store(square + at, code_2.to(tl.uint8), mask=is_held)
    else:
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)


@triton.jit
def _nearest(shares, borders, IS_SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the 255 ascending borders lie below each share: the byte whose fraction is nearest.

    The code has a formula (blocks.py), by which the place is guessed; rounding can make that one off, which the borders
    beside it tell. A search through the borders alone takes eight looks where this takes two.
    """
    size = tl.abs(shares)
    decade = tl.floor(tl.log2(tl.maximum(size, 1e-30)) * 0.30102999566398120) + 7.0  # of log10
    decade = tl.minimum(tl.maximum(decade, 0.0), 6.0)
    cells = tl.exp2(decade if IS_SIGNED else decade + 1.0)
    upper = tl.exp2((decade - 6.0) * 3.3219280948873623)  # 10 to the power
    cell = tl.floor((size / upper - 0.1) / 0.9 * cells)
    place = tl.where(size < 5e-8, -1.0, tl.minimum(tl.maximum(cell, 0.0), cells - 1.0)) + cells
    if IS_SIGNED:
        place = 127.0 + tl.where(shares < 0, -place, place)
    else:
        place = place - 1.0
    found = tl.minimum(tl.maximum(place, 0.0), 254.0).to(tl.int32)
    found = tl.where(tl.load(borders + found) < shares, found + 1, found)
    return tl.where((found > 0) & (tl.load(borders + tl.maximum(found - 1, 0)) >= shares), found - 1, found)
