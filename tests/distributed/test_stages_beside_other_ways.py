"""Layers in stages whose heads are split, whose tokens lie on several processes or whose experts are dealt out.

Float32, plain SGD at a small rate and 1e-5, for the reasons that test_pipeline.py gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.lacking import lacks_order
from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_pipeline import CLOSE, LAYER_TYPES, SGD, SMALL_PACKS
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.launch import run

DEGREES = {
    "stages": "pipeline_parallel_degree",
    "shards": "data_parallel_shard_degree",
    "heads": "tensor_parallel_degree",
    "tokens": "context_parallel_degree",
    "experts": "expert_parallel_degree",
}

Layout = dict[str, Any]


def degrees(order: str = "1F1B", **asked: int) -> Layout:
    return {**{DEGREES[name]: degree for name, degree in asked.items()}, "pipeline_parallel_schedule": order}


HEADS = degrees(stages=2, heads=2)
ALL_TOKENS = {**HEADS, "sequence_parallel": False}
TOKENS = degrees(stages=2, tokens=2)
SMALL = {"training": SMALL_PACKS}

Case = tuple[str, Layout, dict[str, Any]]

CASES: dict[str, Case] = {
    "heads": ("qwen3", HEADS, SMALL),
    "heads, a table that is also the head, fewer packs than stages": ("llama-tied", HEADS, {}),
    "heads, a table that is also the head, all tokens in each": ("llama-tied", ALL_TOKENS, SMALL),
    "heads, norms of heads, all tokens in each": ("qwen3", ALL_TOKENS, SMALL),
    "heads, a head that is gathered": ("llama", {**HEADS, "disable_loss_parallel": True}, SMALL),
    "heads, a loss with more to it": ("llama", HEADS, {**SMALL, "loss": {"label_smoothing": 0.1, "z_loss": 1e-3}}),
    "heads, one document after another": ("llama", HEADS, {"data": {"packing": False}}),
    "heads, two stages in each process": ("llama", degrees("Interleaved1F1B", stages=2, heads=2), SMALL),
    "heads, forward with all packs first": ("qwen3", degrees("GPipe", stages=2, heads=2), SMALL),
    "heads, stages there and back": ("llama-tied", degrees("ZBVZeroBubble", stages=2, heads=2), SMALL),
    "heads, gradients of weights made later, all tokens in each": (
        "qwen3",
        {**degrees("InterleavedZeroBubble", stages=2, heads=2), "sequence_parallel": False},
        {"training": {**SMALL_PACKS, "activation_checkpointing": "full"}},
    ),
    "heads, layers made again": ("qwen3", HEADS, {"training": {**SMALL_PACKS, "activation_checkpointing": "full"}}),
    "heads, products kept": ("qwen3", HEADS, {"training": {**SMALL_PACKS, "activation_checkpointing": "selective"}}),
    "heads, with proofs": ("llama-tied", HEADS, {"training": {**SMALL_PACKS, "preflight": True}}),
    "heads and experts": ("qwen3-moe", HEADS, SMALL),
    "heads and experts, all tokens in each, there and back": (
        "qwen3-moe",
        {**degrees("ZBVZeroBubble", stages=2, heads=2), "sequence_parallel": False},
        SMALL,
    ),
    **{
        f"heads of {family}": (family, HEADS, SMALL)
        for family in ("mistral", "gemma2", "gemma3", "granite", "cohere", "phi", "phi3", "mixtral", "deepseek-v3")
    },
    "tokens": ("mistral", TOKENS, SMALL),
    "tokens, a table that is also the head, fewer packs than stages": ("llama-tied", TOKENS, {}),
    "tokens, one document after another": ("gemma2", TOKENS, {"data": {"packing": False}}),
    "tokens, two stages in each process": ("qwen3", degrees("Interleaved1F1B", stages=2, tokens=2), SMALL),
    "tokens, stages there and back": ("qwen3", degrees("ZBVZeroBubble", stages=2, tokens=2), SMALL),
    "tokens, layers made again": ("llama", TOKENS, {"training": {**SMALL_PACKS, "activation_checkpointing": "full"}}),
    "tokens, with proofs": ("llama-tied", TOKENS, {"training": {**SMALL_PACKS, "preflight": True}}),
    **{f"tokens of {family}": (family, TOKENS, SMALL) for family in ("gemma3", "gpt-oss", "mixtral", "deepseek-v3")},
    "experts among shards": ("qwen3-moe", degrees(stages=2, shards=2, experts=2), SMALL),
    "experts among shards, and now and then no sample": (
        "mixtral",
        degrees(stages=2, shards=2, experts=2),
        {"training": {**SMALL_PACKS, "global_batch_size": 3}},
    ),
    "experts among shards, two stages in each process": (
        "qwen3-moe",
        degrees("Interleaved1F1B", stages=2, shards=2, experts=2),
        SMALL,
    ),
    "experts among shards, with proofs": (
        "qwen3-moe",
        degrees(stages=2, shards=2, experts=2),
        {"training": {**SMALL_PACKS, "preflight": True}},
    ),
    "experts among heads": ("qwen3-moe", degrees(stages=2, heads=2, experts=2), SMALL),
    "experts among heads, there and back": (
        "qwen3-moe",
        degrees("ZBVZeroBubble", stages=2, heads=2, experts=2),
        SMALL,
    ),
    "experts among tokens": ("mixtral", degrees(stages=2, tokens=2, experts=2), SMALL),
    **{
        f"experts of {family}": (family, degrees(stages=2, shards=2, experts=2), SMALL)
        for family in ("gpt-oss", "deepseek-v3")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_processes_find_the_numbers_of_one(case, four, folders, uneven_file, tmp_path):
    same_run(CASES[case], four, folders, uneven_file, tmp_path)


def deep(folders: Any, family: str) -> Path:
    """The folder of a tiny model of four layers."""
    kinds = {"layer_types": LAYER_TYPES[family]} if family in LAYER_TYPES else {}
    made: Path = folders(family, num_hidden_layers=4, **kinds)
    return made


def same_run(case: Case, crew: Any, folders: Any, uneven_file: Path, tmp_path: Path) -> None:
    family, parallelism, sections = case
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 2}, **sections}
    settings["data"] = {"validation_fraction": 0.2, **settings.get("data", {})}
    model = deep(folders, family)
    together = crew.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    if lacks_order(together, parallelism):
        return
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe"])
def test_a_run_goes_on_in_stages_of_whatever_kind_and_without(family, four, folders, uneven_file, tmp_path):
    model, output = deep(folders, family), tmp_path / "run"
    settings = {
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False, "max_tokens_per_gpu": 256},
        "optimizer": {**SGD, "momentum": 0.9},
        "checkpoint": {"interval": 1},
    }
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)

    def go_on(parallelism: Layout, step: int) -> None:
        order = {"signalled": 1, "step": step}
        ended = four.train(model, uneven_file, output, order, parallelism=parallelism, **settings)
        assert [each.get("error") for each in ended] == ["Interrupted"] * 4, ended

    def stop(report: Any) -> None:
        raise KeyError("the plug was pulled")

    go_on(HEADS, 2)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        run(recipe(model, uneven_file, output, **settings), Given(watchers=[stop]))
    go_on({"data_parallel_shard_degree": 4}, 5)
    go_on(degrees(stages=2, shards=2, experts=2) if family == "qwen3-moe" else degrees(stages=2, shards=2), 7)
    resumed = four.train(model, uneven_file, output, parallelism=TOKENS, **settings)
    same_steps(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism", [HEADS, TOKENS, degrees(stages=2, shards=2, experts=2), degrees(stages=2, heads=2, experts=2)]
)
def test_a_small_rate_moves_bfloat16_weights(parallelism, four, folders, uneven_file, tmp_path):
    model = deep(folders, "qwen3-moe")
    settings = {"model": {"dtype": "bfloat16"}, "training": {**STEPS, "preflight": True}, "optimizer": {"lr": 1e-6}}
    together = four.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    assert together[0].get("status") == "finished", together[0]
    before, after = weights(model), weights(together[0]["model_path"])
    asked = [name for name in before if "experts" not in name]  # one to which no token is sent stays
    assert not [name for name in asked if not (before[name].bfloat16().float() != after[name]).any()]


KEPT_WHOLE = {
    "muon": {"name": "Muon", "lr": 1e-3},
    "moments in bytes": {"name": "AdamW", "state": "8bit", "lr": 1e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [degrees(stages=2, shards=2), HEADS, degrees(stages=2, shards=2, experts=2)])
@pytest.mark.parametrize("optimizer", KEPT_WHOLE)
def test_owners_of_whole_weights_are_found_within_a_stage(optimizer, parallelism, four, folders, uneven_file, tmp_path):
    """Gradients differ by rounding, which 8-bit codes and 16-bit products make something of: losses agree to 1e-4."""
    model = folders("qwen3-moe", num_hidden_layers=4, hidden_size=64, moe_intermediate_size=128)
    settings = {
        "training": {"global_batch_size": 8, "epochs": 1, "preflight": False, "max_tokens_per_gpu": 256},
        "optimizer": KEPT_WHOLE[optimizer],
        "checkpoint": {"interval": 1},
    }
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)
    order = {"signalled": 3, "step": 2}
    ended = four.train(model, uneven_file, tmp_path / "run", order, parallelism=parallelism, **settings)
    assert [each.get("error") for each in ended] == ["Interrupted"] * 4, ended
    resumed = train(model, uneven_file, tmp_path / "run", **settings)
    assert len(resumed.history) == len(unbroken.history) == 5
    for row, wanted in zip(resumed.history, unbroken.history, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
