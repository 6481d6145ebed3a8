"""A float32 number taken apart into two halves is there again, bit for bit."""

from __future__ import annotations

import torch

from training_hub.backends.torch_engine.optimizers.split import join, split


def numbers() -> torch.Tensor:
    """Random bits of every sign and size, and those around each border between two roundings; all are finite."""
    torch.manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (300_000,)).to(torch.int32).view(torch.float32)
    heads = torch.randint(-(2**15), 2**15, (4000,)).to(torch.int32) << 16
    around = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    found = torch.cat([drawn, (heads[:, None] + around).view(torch.float32).flatten(), torch.tensor([0.0, -0.0])])
    return found[found.isfinite()]


def test_both_halves_together_are_the_number_bit_for_bit():
    exact = numbers()
    assert torch.equal(join(*split(exact)).view(torch.int32), exact.view(torch.int32))


def test_the_first_half_is_the_nearest_bfloat16_and_torchs_own_where_there_is_only_one():
    exact = numbers()
    weight, _ = split(exact)
    is_tie = (exact.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~is_tie], exact[~is_tie].to(torch.bfloat16))
    towards_zero = (exact[is_tie].view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert (weight[is_tie].double().abs() > towards_zero.double().abs()).all()


def test_an_exact_bfloat16_needs_no_extra_bits():
    assert not split(torch.randn(1000).bfloat16().float())[1].any()
