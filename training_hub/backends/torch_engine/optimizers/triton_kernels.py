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
    borders: tuple[Tensor, Tensor],
    rate: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    corrections: tuple[float, float],
    factor: Tensor | None = None,
) -> None:
    """Move a weight, its extra bits and its moments by one step, in place. All are contiguous; gradient is float32.

    borders: those of the signed code, then of the other. corrections: 1 - beta1^step and the root of 1 - beta2^step.
    factor: what the gradient is to be multiplied by, a number on the device.
    """
    is_8bit = "exp_avg_scale" in state
    scales = [state[f"{name}_scale"] if is_8bit else gradient for name in ("exp_avg", "exp_avg_sq")]
    _adamw_step[(triton.cdiv(weight.numel(), GROUP * BLOCK.value),)](
        weight if extra is None else weight.view(extra.dtype), weight if extra is None else extra, gradient,
        gradient if factor is None else factor,
        state["exp_avg"], scales[0], state["exp_avg_sq"], scales[1], *borders,
        weight.numel(), rate * decay, betas[0], betas[1], eps, rate / corrections[0], corrections[1],
        extra is not None, is_8bit, factor is not None, GROUP,
    )  # fmt: skip


@triton.jit
def _adamw_step(  # type: ignore[no-untyped-def]
    weight, extra, gradient, factor, mean, mean_scale, square, square_scale, signed_borders, borders,
    count, shrink, beta1, beta2, eps, stride, root,
    IS_SPLIT: tl.constexpr, IS_8BIT: tl.constexpr, HAS_FACTOR: tl.constexpr, GROUP: tl.constexpr,
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
    if HAS_FACTOR:
        slope = slope * tl.load(factor)
    if IS_8BIT:
        code_1 = tl.load(mean + at, mask=is_held, other=0).to(tl.int32)
        code_2 = tl.load(square + at, mask=is_held, other=0).to(tl.int32)
        m = _value(code_1, True) * tl.load(mean_scale + block, mask=is_block, other=0.0)[:, None]
        v = _value(code_2, False) * tl.load(square_scale + block, mask=is_block, other=0.0)[:, None]
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
def _value(code, IS_SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fraction that a byte names, by the code's formula (blocks.py); looking it up in a table takes longer."""
    place = tl.abs(code - 127) if IS_SIGNED else code  # 0 is 0, the last is 1, between them are the cells in order
    order = tl.where(place > 0, place, 1) if IS_SIGNED else tl.where(place > 0, place + 1, 2)
    octave = (order.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the whole part of log2
    cells = tl.exp2(octave.to(tl.float32))
    decade = octave if IS_SIGNED else octave - 1
    upper = tl.where(decade >= 6, 1.0, tl.where(decade == 5, 1e-1, tl.where(decade == 4, 1e-2, 1e-3)))
    lower = tl.where(decade == 2, 1e-4, tl.where(decade == 1, 1e-5, 1e-6))
    upper = tl.where(decade >= 3, upper, lower)
    size = upper * (0.1 + 0.9 / cells * (order.to(tl.float32) - cells + 0.5))
    size = tl.where(place == 0, 0.0, tl.where(code == 255, 1.0, size))
    return tl.where(code < 127, -size, size) if IS_SIGNED else size


@triton.jit
def _nearest(shares, borders, IS_SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the 255 ascending borders lie below each share: the byte whose fraction is nearest.

    The code has a formula, which is right but for what lies at the edge of a cell, where it rounds, and in the first
    and last cell of a decade, whose borders are not their edges. There the borders are asked, two looks where a search
    through all of them takes eight.
    """
    size = tl.abs(shares)
    decade = tl.floor(tl.log2(tl.maximum(size, 1e-30)) * 0.30102999566398120) + 7.0  # of log10
    decade = tl.minimum(tl.maximum(decade, 0.0), 6.0)
    cells = tl.exp2(decade if IS_SIGNED else decade + 1.0)
    upper = tl.exp2((decade - 6.0) * 3.3219280948873623)  # 10 to the power
    along = (size / upper - 0.1) / 0.9 * cells
    cell = tl.floor(along)
    is_inside = (along - cell > 1e-3) & (along - cell < 1.0 - 1e-3)
    must_ask = (cell < 1.0) | (cell > cells - 1.5) | (is_inside == 0)
    place = tl.where(size < 5e-8, -1.0, tl.minimum(tl.maximum(cell, 0.0), cells - 1.0)) + cells
    if IS_SIGNED:
        place = 127.0 + tl.where(shares < 0, -place, place)
    else:
        place = place - 1.0
    found = tl.minimum(tl.maximum(place, 0.0), 254.0).to(tl.int32)
    found = tl.where(tl.load(borders + found, mask=must_ask, other=2.0) < shares, found + 1, found)
    below = tl.load(borders + tl.maximum(found - 1, 0), mask=must_ask & (found > 0), other=-2.0)
    return tl.where(below >= shares, found - 1, found)
