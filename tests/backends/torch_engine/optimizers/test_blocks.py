"""One byte for a number: what it can name, and how near that is."""

from __future__ import annotations

import pytest
import torch

from training_hub.backends.torch_engine.optimizers.blocks import BLOCK, code, dequantize, quantize


@pytest.mark.parametrize("signed", [True, False])
def test_a_byte_names_256_fractions_among_them_0_and_1(signed):
    found = code(signed=signed)
    assert len(set(found)) == 256
    assert found == sorted(found)
    assert {0.0, 1.0} <= set(found)
    assert (min(found) < 0) == signed


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_becomes_the_nearest_fraction_of_the_largest_of_its_block(signed):
    torch.manual_seed(0)
    numbers = torch.randn(2 * BLOCK + 7) * torch.logspace(-6, 3, 2 * BLOCK + 7)
    numbers = numbers if signed else numbers.abs()
    codes, scales = quantize(numbers, signed=signed)
    assert codes.shape == (3, BLOCK) and codes.dtype == torch.uint8
    fractions = torch.tensor(code(signed=signed))
    found = dequantize(codes, scales, len(numbers), signed=signed)
    for start in range(0, len(numbers), BLOCK):
        part, largest = numbers[start : start + BLOCK], numbers[start : start + BLOCK].abs().max()
        distance = (part[:, None] / largest - fractions).abs().min(1).values
        torch.testing.assert_close(
            (found[start : start + BLOCK] - part).abs() / largest, distance, atol=2e-7, rtol=1e-5
        )


def test_the_relative_error_is_small_over_three_orders_of_magnitude():
    numbers = torch.logspace(0, -3, BLOCK)
    for signed, limit in ((False, 0.13), (True, 0.23)):
        found = dequantize(*quantize(numbers, signed=signed), BLOCK, signed=signed)
        assert ((found - numbers).abs() / numbers).max() < limit


def test_a_mean_square_above_0_never_becomes_0():
    numbers = torch.tensor([1.0, 1e-9, 1e-30, 0.0])
    found = dequantize(*quantize(numbers, signed=False), 4, signed=False)
    assert (found[:3] > 0).all() and found[3] == 0


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_of_zeros_stays_one(signed):
    codes, scales = quantize(torch.zeros(BLOCK), signed=signed)
    assert not dequantize(codes, scales, BLOCK, signed=signed).any()
