"""A float32 number in two halves: its nearest bfloat16, and 16 bits that make it exact again.

The first half is the weight that forward and backward use, so a master costs 2 bytes more and not 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 of float32 numbers, and as int16 how many steps of float32 they lie above it.

    Of two that are equally near it is the one further from 0, where torch takes the even one: with the even one there
    would be 65,537 numbers to tell apart for every other bfloat16, one too many for 16 bits.
    """
    bits = exact.contiguous().view(torch.int32)
    rounded = (bits + 0x8000) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16), (bits - (rounded << 16)).to(torch.int16)


def join(weight: Tensor, extra: Tensor) -> Tensor:
    """The float32 numbers that `split` took apart, bit for bit."""
    return ((weight.contiguous().view(torch.int16).to(torch.int32) << 16) + extra).view(torch.float32)
