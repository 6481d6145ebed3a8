"""Experts dealt out beside shards, heads and tokens, to as many processes as divide these, find the numbers of one.

Float32 and plain SGD, for the reasons that test_equal_numbers.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.distributed.test_split_models import CLOSE, SMALL_PACKS, same_steps
from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.launch import run

DEGREES = {"shards": "data_parallel_shard_degree", "heads": "tensor_parallel_degree",
           "tokens": "context_parallel_degree", "experts": "expert_parallel_degree"}  # fmt: skip


def degrees(**asked: int) -> dict[str, int]:
    return {DEGREES[name]: degree for name, degree in asked.items()}


Case = tuple[str, dict[str, int], dict[str, Any]]

IN_TWO: dict[str, Case] = {
    "heads, and experts among them": ("qwen3-moe", degrees(heads=2, experts=2), {"training": SMALL_PACKS}),
    "tokens, and experts among them": ("mixtral", degrees(tokens=2, experts=2), {"training": SMALL_PACKS}),
}

IN_FOUR: dict[str, Case] = {
    "half as many as shards": ("qwen3-moe", degrees(shards=4, experts=2), {"training": SMALL_PACKS}),
    "shards and heads, among neighbours": ("qwen3-moe", degrees(shards=2, heads=2, experts=2), {}),
    "shards and heads, among all": ("mixtral", degrees(shards=2, heads=2, experts=4), {"training": SMALL_PACKS}),
    "shards and tokens, among neighbours": ("mixtral", degrees(shards=2, tokens=2, experts=2), {}),
    "shards and tokens, among all": ("qwen3-moe", degrees(shards=2, tokens=2, experts=4), {"training": SMALL_PACKS}),
    "tokens in two groups": ("qwen3-moe", degrees(tokens=4, experts=2), {}),
    "heads and tokens, among all": ("deepseek-v3", degrees(heads=2, tokens=2, experts=4), {}),
    "two replicas of heads with experts": ("deepseek-v3", degrees(heads=2, experts=2), {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=pytest.mark.slow) if "tokens" in one else one for one in IN_TWO]
)
def test_two_processes_find_the_numbers_of_one(case, two, folders, uneven_file, tmp_path):
    same_run(IN_TWO[case], two, folders, uneven_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_FOUR)
def test_four_processes_find_them_too(case, four, folders, uneven_file, tmp_path):
    same_run(IN_FOUR[case], four, folders, uneven_file, tmp_path)


def same_run(case: Case, crew: Any, folders: Any, uneven_file: Any, tmp_path: Any) -> None:
    family, parallelism, sections = case
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 2}, **sections}
    settings["data"] = {"validation_fraction": 0.2}
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    together = crew.train(folders(family), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [degrees(shards=4, experts=2), degrees(shards=2, heads=2, experts=4)])
def test_osft_protects_experts_wherever_they_lie(parallelism, four, folders, uneven_file, tmp_path):
    settings = {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False}}
    same_run(("qwen3-moe", parallelism, settings), four, folders, uneven_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [degrees(shards=4, experts=2), degrees(shards=2, heads=2, experts=2)])
def test_a_small_rate_moves_bfloat16_weights(parallelism, four, folders, uneven_file, tmp_path):
    model = folders("qwen3-moe")
    settings = {"model": {"dtype": "bfloat16"}, "training": {**STEPS, "preflight": True}, "optimizer": {"lr": 1e-6}}
    together = four.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    assert together[0].get("status") == "finished", together[0]
    before, after = weights(model), weights(together[0]["model_path"])
    asked = [name for name in before if "experts" not in name]  # one to which no token is sent stays
    assert not [name for name in asked if not (before[name].bfloat16().float() != after[name]).any()]
    dealt = [name for name in before if "experts" in name]
    assert any((before[name].bfloat16().float() != after[name]).any() for name in dealt)


@pytest.mark.slow
def test_a_run_goes_on_wherever_experts_lie(four, folders, uneven_file, tmp_path):
    model, output = folders("qwen3-moe"), tmp_path / "run"
    settings = {
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False},
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "checkpoint": {"interval": 1},
    }
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)

    def go_on(parallelism: dict[str, int], step: int) -> None:
        order = {"signalled": 1, "step": step}
        ended = four.train(model, uneven_file, output, order, parallelism=parallelism, **settings)
        assert [each.get("error") for each in ended] == ["Interrupted"] * 4, ended

    go_on(degrees(shards=4, experts=2), 2)

    def stop(report: Any) -> None:
        raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError, match="the plug was pulled"):
        run(recipe(model, uneven_file, output, **settings), Given(watchers=[stop]))
    go_on(degrees(shards=2, heads=2, experts=4), 5)
    resumed = four.train(model, uneven_file, output, parallelism=degrees(shards=2, tokens=2, experts=2), **settings)
    same_steps(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE
