"""The plan counts what libraries keep for products, many beside an adapter, and scales whole in each process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.adaptations.holdings import NOTHING
from training_hub.backends.torch_engine.fused import panels
from training_hub.backends.torch_engine.layouts.share import Share
from training_hub.backends.torch_engine.planning.memory import (
    GIB,
    MOST_SIZES,
    PRODUCT_KEPT,
    SIZES_OF_LOOKS,
    estimate,
)
from training_hub.recipe.parallelism import Parallelism
from training_hub.recipe.sections import Optimizer

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")


def planned(dtype: torch.dtype, *, is_adapted: bool = True, **how: Any) -> Any:
    model: Any = tiny_model("llama")
    if is_adapted:
        peft.get_peft_model(model.requires_grad_(False), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    return estimate(model, Optimizer(), dtype, CPU, random_pack((30, 20)), **how)


def test_products_beside_an_adapter_are_counted_by_the_sizes_of_packs():
    few, many, most = (planned(torch.bfloat16, num_pack_sizes=count) for count in (1, 10, 10_000))
    assert few["products"] < many["products"] < most["products"]
    assert most["products"] * GIB == pytest.approx(MOST_SIZES * PRODUCT_KEPT["cpu"])
    assert most["total"] - few["total"] == pytest.approx(most["products"] - few["products"])


def test_products_of_whole_weights_keep_what_was_met_before_the_first_step():
    """Where our kernel multiplies; elsewhere each number of tokens brings its own."""
    few, many = (planned(torch.bfloat16, is_adapted=False, num_pack_sizes=count) for count in (1, 10))
    if panels.is_trusted(torch.bfloat16):
        assert few["products"] * GIB == pytest.approx(SIZES_OF_LOOKS * PRODUCT_KEPT["cpu"])
    assert (few["products"] < many["products"]) != panels.is_trusted(torch.bfloat16)


def test_compiled_products_are_none_of_our_kernel():
    few, many = (planned(torch.bfloat16, is_adapted=False, is_compiled=True, num_pack_sizes=count) for count in (1, 10))
    assert few["products"] < many["products"]


@pytest.mark.parametrize("is_adapted", [True, False])
def test_products_in_float32_keep_nothing(is_adapted):
    assert "products" not in planned(torch.float32, is_adapted=is_adapted)


def test_scales_of_slices_are_whole():
    share = Share.of(Parallelism(data_parallel_shard_degree=4), 4)
    low = replace(NOTHING, quantised=10_000, bits=4.5)
    with_scales, without = (planned(torch.float32, share=share, holdings=one) for one in (low, replace(low, bits=4.0)))
    assert (with_scales["weights"] - without["weights"]) * GIB == pytest.approx(10_000 * 0.5 / 8)
