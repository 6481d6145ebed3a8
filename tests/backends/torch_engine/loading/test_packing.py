"""A quantised weight in parts has the numbers of the whole, bit for bit, along its rows and along its columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from training_hub.backends.torch_engine.loading.packing import packed
from training_hub.backends.torch_engine.loading.quantization import dense, is_quantised, part

CUTS = [
    ((96, 256), 0, 2),
    ((96, 256), 0, 3),
    ((96, 256), 1, 4),
    ((64, 832), 0, 4),
    ((64, 832), 1, 13),
    ((160, 384), 1, 3),
    ((64, 48), 0, 2),
]
"""Shapes, whether rows or columns are cut, and in how many parts. Rows of 4, 13, 6 and three quarters of a block of 64,
so that blocks of 256 scales end within rows and within parts."""


def quantised(kind: str, shape: tuple[int, int]) -> Any:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind == "int4":
        nn_of = pytest.importorskip("bitsandbytes").nn
        return nn_of.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    made = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(*shape[::-1], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    made.quantize_(layer, made.Int8WeightOnlyConfig())
    return layer.weight


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize(("shape", "dimension", "among"), CUTS)
def test_parts_make_the_numbers_of_the_whole(kind, shape, dimension, among):
    weight = quantised(kind, shape)
    assert is_quantised(weight)
    low, packing = packed(weight)
    whole = packing.dense(low)
    assert whole.shape == shape and whole.unique().numel() > 100
    laid = packing.laid_out(low, dimension).chunk(among, dimension)
    parts = [packing.part(dimension, place, among).dense(mine.clone()) for place, mine in enumerate(laid)]
    assert len(parts) == among
    assert torch.equal(torch.cat(parts, dimension), whole)


@pytest.mark.parametrize("shape", [(64, 128), (64, 96), (64, 48), (6, 50)])
def test_four_bits_say_what_the_weight_was_whatever_its_width(shape):
    """NF4's 16 levels lie so that of normal numbers a tenth is lost (Dettmers et al. 2023, arXiv:2305.14314)."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(*shape[::-1], bias=False, device="meta"))
    model[0].weight = quantised("int4", shape)
    part(model)
    assert (dense(model[0], torch.float32) - weight).norm() < 0.12 * weight.norm()
    x = torch.eye(shape[1])
    assert torch.equal(model(x), dense(model[0], torch.float32).T)
