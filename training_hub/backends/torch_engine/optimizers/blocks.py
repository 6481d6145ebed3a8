"""Float32 numbers as one byte each: blocks of 256 share a scale, and a byte names one of 256 fractions of it.

Source: Dettmers et al. 2021, arXiv:2110.02861, section 2: block-wise quantization with a dynamic tree code.
"""

# N numbers, B blocks

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
DECADES = 7
LEAST = 4096
"""Tensors of fewer numbers stay float32, as in the paper: they are norms and biases, and cost nothing."""


def quantize(numbers_N: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Bytes [B, 256] and scales [B]: each number becomes the nearest fraction of the largest of its block.

    The last block is filled up with zeros. Without a sign a number above 0 never becomes 0: the mean of squares stands
    below a fraction line, where 0 would turn a small step into one of 1 / eps.
    """
    blocks = pad(numbers_N, (0, -numbers_N.numel() % BLOCK)).view(-1, BLOCK)
    scales_B = blocks.abs().amax(1)
    shares = blocks / scales_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    _, borders = tables(signed, str(numbers_N.device))
    chosen = torch.bucketize(shares, borders, out_int32=True)
    if not signed:
        chosen = torch.where(blocks > 0, chosen.clamp_min(1), chosen)
    return chosen.to(torch.uint8), scales_B


def dequantize(codes: Tensor, scales_B: Tensor, count: int, *, signed: bool) -> Tensor:
    """The first `count` numbers that the bytes stand for, [N] in float32."""
    values, _ = tables(signed, str(codes.device))
    return (values[codes.int()] * scales_B[:, None]).view(-1)[:count]


def code(*, signed: bool) -> list[float]:
    """The 256 fractions that a byte can name, ascending.

    Seven decades down from 1, each cut into twice as many equal cells as the one below, of which the centres count.
    Two signs leave half as many cells for each. 0 and 1 are exact.
    """
    found = [0.0, 1.0]
    for decade in range(DECADES):
        cells = 2 ** (decade + (0 if signed else 1))
        width = 0.9 / cells
        centres = [10.0 ** (decade - DECADES + 1) * (0.1 + width * (cell + 0.5)) for cell in range(cells)]
        found += centres + ([-centre for centre in centres] if signed else [])
    return sorted(found)


@lru_cache(maxsize=8)
def tables(signed: bool, device: str) -> tuple[Tensor, Tensor]:
    """The 256 values of the code, ascending, and the 255 borders half-way between its neighbours, on a device."""
    values = torch.tensor(code(signed=signed), dtype=torch.float32, device=device)
    return values, (values[1:] + values[:-1]) / 2
