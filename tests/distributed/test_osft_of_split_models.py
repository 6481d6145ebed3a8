"""OSFT beside a model that is split by heads, tokens or experts learns and protects what it does in one process.

Float32 and plain SGD, for the reasons that test_equal_numbers.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.distributed.test_split_models import (
    CLOSE,
    CONTEXT,
    EXPERTS,
    SMALL_PACKS,
    TENSOR,
    Case,
    broken_off,
    same_steps,
)
from tests.invariants.run import train

OSFT = {"unfreeze_rank_ratio": 0.5, "cache": False}

CASES: dict[str, Case] = {
    "heads": ("llama", TENSOR, {}),
    "experts": ("qwen3-moe", EXPERTS, {}),
}

MORE_CASES: dict[str, Case] = {
    "tokens, small packs added up": ("llama", CONTEXT, {"training": SMALL_PACKS}),
    "tokens, layer by layer": ("qwen3", CONTEXT, {"training": SMALL_PACKS, "osft": {**OSFT, "gradients": "layer"}}),
    "heads, layer by layer": ("qwen3", TENSOR, {"training": SMALL_PACKS, "osft": {**OSFT, "gradients": "layer"}}),
    "heads, all tokens in each": ("qwen3", {**TENSOR, "sequence_parallel": False}, {"osft": {**OSFT, "form": "core"}}),
    "heads of fused weights, cut one by one": ("phi3", TENSOR, {"osft": {**OSFT, "split_fused": True}}),
    "heads and experts": ("qwen3-moe", TENSOR, {"training": SMALL_PACKS}),
    "heads of latent attention": ("deepseek-v3", TENSOR, {}),
    "experts, small packs added up": ("mixtral", EXPERTS, {"training": SMALL_PACKS}),
}

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES]


def same_protection(alone: Any, together: list[dict[str, Any]]) -> None:
    """Nothing leaks into what is protected, and weights move as far as in one process."""
    for each in together:
        for row, wanted in zip(each["history"], alone.history, strict=True):
            # Rounding of float32 alone, of which no digit is the same twice.
            assert 0 <= row["osft_leak"] <= 1e-6 and wanted["osft_leak"] <= 1e-6
            assert row["osft_drift"] == pytest.approx(wanted["osft_drift"], rel=CLOSE)


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_two_processes_learn_and_protect_what_one_does(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    settings = {"algorithm": "osft", "osft": OSFT, "training": STEPS, "optimizer": SGD, **sections}
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    together = two.train(folders(family), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    same_protection(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


PRODUCTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two groups of two that split heads": ("qwen3", TENSOR),
    "slices of weights that are split by heads": ("llama", {**TENSOR, "data_parallel_shard_degree": 2}),
    "slices of weights, and tokens": ("llama", {**CONTEXT, "data_parallel_shard_degree": 2}),
    "replicas, slices and experts": ("qwen3-moe", EXPERTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_four_processes_do_by_two_ways_at_once(case, four, folders, uneven_file, tmp_path):
    family, parallelism = PRODUCTS[case]
    settings = {"algorithm": "osft", "osft": OSFT, "training": STEPS, "optimizer": SGD}
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    together = four.train(folders(family), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    same_protection(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


LONGER = {"training": {"global_batch_size": 4, "epochs": 1, "preflight": False}, "checkpoint": {"interval": 1}}


@pytest.mark.slow
def test_what_is_protected_goes_on_however_the_model_is_split(two, folders, uneven_file, tmp_path):
    settings = {"algorithm": "osft", "osft": OSFT, "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}, **LONGER}
    same_protection(*broken_off(two, folders("llama"), uneven_file, tmp_path, settings))


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [TENSOR, CONTEXT, {"data_parallel_shard_degree": 2}])
def test_weights_in_16_bits_go_on_from_where_they_started(parallelism, two, folders, uneven_file, tmp_path):
    """A checkpoint holds starts where weights are in 16 bits, and weights where they are in slices of float32."""
    model, output = folders("llama"), tmp_path / "run"
    settings = {"algorithm": "osft", "osft": OSFT, "optimizer": SGD, **LONGER}
    settings["model"] = {"dtype": "bfloat16", "save_dtype": "float32"}
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)
    order = {"signalled": 1, "step": 4}
    ended = two.train(model, uneven_file, output, order, parallelism=parallelism, **settings)
    assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended
    resumed = train(model, uneven_file, output, **settings)
    before, wanted, found = weights(model), weights(unbroken.model_path), weights(resumed.model_path)
    # Sums of bfloat16 numbers in another order are off by a few in a thousand of what was learned.
    for name, weight in wanted.items():
        moved = torch.linalg.vector_norm(weight - before[name])
        assert torch.linalg.vector_norm(found[name] - weight) <= 0.05 * moved, name
    assert resumed.history[-1]["osft_leak"] <= 1e-5
