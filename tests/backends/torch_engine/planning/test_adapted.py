"""The plan of a run with an adapter counts what libraries keep for its products, and scales whole in each process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.adaptations.holdings import NOTHING
from training_hub.backends.torch_engine.layouts.share import Share
from training_hub.backends.torch_engine.planning.memory import GIB, MOST_SIZES, PRODUCT_KEPT, estimate
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


@pytest.mark.parametrize(("dtype", "is_adapted"), [(torch.float32, True), (torch.bfloat16, False)])
def test_other_products_keep_nothing(dtype, is_adapted):
    assert "products" not in planned(dtype, is_adapted=is_adapted)


def test_scales_of_slices_are_whole():
    share = Share.of(Parallelism(data_parallel_shard_degree=4), 4)
    low = replace(NOTHING, quantised=10_000, bits=4.5)
    with_scales, without = (planned(torch.float32, share=share, holdings=one) for one in (low, replace(low, bits=4.0)))
    assert (with_scales["weights"] - without["weights"]) * GIB == pytest.approx(10_000 * 0.5 / 8)
