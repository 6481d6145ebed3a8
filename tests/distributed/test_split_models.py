"""A model that is split over two or four processes finds the numbers of one: by heads and vocabulary, tokens, experts.

Float32. Sums are split and added up in another order, so that numbers differ by rounding; what is promised is 1e-5.
Weights are compared under plain SGD, for the reason that test_equal_numbers.py gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.launch import run

CLOSE = 1e-5

TENSOR = {"tensor_parallel_degree": 2}
WITHOUT_SLICES = {**TENSOR, "sequence_parallel": False}
CONTEXT = {"context_parallel_degree": 2}
SMALL_PACKS = {**STEPS, "max_tokens_per_gpu": 256}


def same_steps(alone: Any, together: list[dict[str, Any]]) -> None:
    """Each step's loss, gradient norm, validation loss and counts are those of one process, on every rank."""
    for each in together:
        assert each.get("status") == "finished", each
        assert len(each["history"]) == len(alone.history) > 0
        for row, wanted in zip(each["history"], alone.history, strict=True):
            for key in {"loss", "grad_norm", "validation_loss"} & wanted.keys():
                assert row[key] == pytest.approx(wanted[key], rel=CLOSE), key
            for key in ("tokens", "trained_tokens", "samples", "epoch", "learning_rate"):
                assert row[key] == wanted[key]


EXPERTS = {"expert_parallel_degree": 2, "data_parallel_shard_degree": 2}
FEW = {**STEPS, "global_batch_size": 3}
NOISE = {"loss": {"neftune_noise_alpha": 5.0}, "training": SMALL_PACKS}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "heads, widths and the vocabulary": ("llama", TENSOR, {"loss": {"label_smoothing": 0.1, "z_loss": 1e-3}}),
    "norms of heads, small packs added up": ("qwen3", TENSOR, {"training": SMALL_PACKS}),
    "a table that is also the head": ("llama-tied", TENSOR, {}),
    "heads and experts": ("qwen3-moe", TENSOR, {}),
    "tokens in a window, small packs added up": ("mistral", CONTEXT, {"training": SMALL_PACKS}),
    "experts, and now and then no sample": ("qwen3-moe", EXPERTS, {"training": FEW}),
    "noise on embeddings beside heads": ("llama", TENSOR, NOISE),
}

MORE_CASES: dict[str, Case] = {
    "heads, one document after another": ("llama", TENSOR, {"data": {"packing": False}}),
    "a head that is gathered": ("llama", {**TENSOR, "disable_loss_parallel": True}, {}),
    "heads, all tokens in each": ("qwen3", WITHOUT_SLICES, {"training": SMALL_PACKS}),
    "heads, all tokens and a head in each": ("llama-tied", {**WITHOUT_SLICES, "disable_loss_parallel": True}, {}),
    "heads and experts, all tokens in each": ("qwen3-moe", WITHOUT_SLICES, {}),
    "heads of latent attention, all tokens in each": ("deepseek-v3", WITHOUT_SLICES, {}),
    "layers made again, all tokens in each": (
        "llama",
        WITHOUT_SLICES,
        {"training": {**STEPS, "activation_checkpointing": "full"}},
    ),
    "layers of which products are kept": (
        "qwen3",
        TENSOR,
        {"training": {**STEPS, "activation_checkpointing": "selective"}},
    ),
    "heads, with proofs": ("llama", TENSOR, {"training": {**STEPS, "preflight": True}}),
    "a loss weighted by confidence": ("llama", TENSOR, {"loss": {"dft": True}}),
    "noise on a table that is also the head, all tokens in each": ("llama-tied", WITHOUT_SLICES, NOISE),
    "noise beside tokens": ("llama", CONTEXT, NOISE),
    "noise beside tokens, one document after another": ("qwen3", CONTEXT, {**NOISE, "data": {"packing": False}}),
    "tokens": ("llama", CONTEXT, {}),
    "tokens, one document after another": ("gemma2", CONTEXT, {"data": {"packing": False}}),
    "tokens of a mixture of experts": ("mixtral", CONTEXT, {}),
    "layers made again": ("llama", TENSOR, {"training": {**STEPS, "activation_checkpointing": "full"}}),
    **{
        f"heads of {family}": (family, TENSOR, {})
        for family in (
            "qwen2",
            "mistral",
            "gemma2",
            "gemma3",
            "granite",
            "cohere",
            "phi",
            "phi3",
            "mixtral",
            "deepseek-v3",
        )
    },
    **{f"tokens of {family}": (family, CONTEXT, {}) for family in ("gemma3", "gpt2", "gpt-oss", "deepseek-v3")},
    **{f"experts of {family}": (family, EXPERTS, {}) for family in ("mixtral", "gpt-oss", "deepseek-v3")},
}

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES]


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_two_processes_find_the_numbers_of_one(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 2}, **sections}
    settings["data"] = {"validation_fraction": 0.2, **settings.get("data", {})}
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    together = two.train(folders(family), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


PRODUCTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two groups of two that split heads": ("qwen3", {"tensor_parallel_degree": 2}),
    "slices of weights that are split by heads": (
        "llama",
        {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2},
    ),
    "heads and tokens": ("llama", {"tensor_parallel_degree": 2, "context_parallel_degree": 2}),
    "replicas, slices and experts": ("qwen3-moe", EXPERTS),
    "slices of weights, and tokens": ("qwen3-moe", {"data_parallel_shard_degree": 2, "context_parallel_degree": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_four_processes_find_them_by_two_ways_at_once(case, four, folders, uneven_file, tmp_path):
    family, parallelism = PRODUCTS[case]
    settings = {"training": STEPS, "optimizer": SGD}
    alone = train(folders(family), uneven_file, tmp_path / "alone", **settings)
    together = four.train(folders(family), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


@pytest.mark.parametrize(
    "parallelism",
    [TENSOR, *(pytest.param(one, marks=pytest.mark.slow) for one in (WITHOUT_SLICES, CONTEXT))],
    ids=["heads", "heads, all tokens in each", "tokens"],
)
def test_an_adapter_learns_the_same_beside_a_split_model(parallelism, two, folders, uneven_file, tmp_path):
    settings = {"training": STEPS, "optimizer": SGD, "algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **settings)
    together = two.train(folders("llama"), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    found = weights(together[0]["model_path"], "adapter_model")
    assert apart(weights(alone.model_path, "adapter_model"), found) <= CLOSE


def broken_off(two: Any, model: Path, rows: Path, folder: Path, settings: dict[str, Any]) -> tuple[Any, list[dict]]:
    """What a run gives in one process, and what one gives that is broken off in turn with split heads, in one process
    and with split tokens, and ends with split heads: the same steps."""
    unbroken, output = train(model, rows, folder / "unbroken", **settings), folder / "run"

    def go_on(parallelism: dict[str, int], step: int) -> None:
        order = {"signalled": 1, "step": step}
        ended = two.train(model, rows, output, order, parallelism=parallelism, **settings)
        assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended

    def stop(report: Any) -> None:
        raise KeyError("the plug was pulled")

    go_on(TENSOR, 2)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        run(recipe(model, rows, output, **settings), Given(watchers=[stop]))
    go_on(CONTEXT, 5)
    resumed = two.train(model, rows, output, parallelism=TENSOR, **settings)
    same_steps(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE
    return unbroken, resumed


def test_a_run_goes_on_however_the_model_is_split(two, folders, uneven_file, tmp_path):
    settings = {
        "training": {"global_batch_size": 4, "epochs": 1, "preflight": False},
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "checkpoint": {"interval": 1},
    }
    broken_off(two, folders("llama"), uneven_file, tmp_path, settings)


WHOLE_LOSS = {**TENSOR, "disable_loss_parallel": True}
TEACHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads and a head that is gathered": (WHOLE_LOSS, {}),
    "tokens": (CONTEXT, {}),
    "tokens, asked before": (CONTEXT, {"cache": "top_k", "top_k": 8}),
    "tokens, drawn before": (CONTEXT, {"cache": "sampled", "samples": 8}),
    "tokens, behind a message of its own": (CONTEXT, {"prompt": "You know it."}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_is_asked_beside_a_split_student(case, two, folders, uneven_file, tmp_path):
    parallelism, asked = TEACHERS[case]
    settings = {
        "training": STEPS,
        "optimizer": SGD,
        "distillation": {"teacher": str(folders("qwen3")), "alpha": 0.5, **asked},
    }
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **settings)
    together = two.train(folders("llama"), uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [TENSOR, CONTEXT, EXPERTS], ids=["heads", "tokens", "experts"])
def test_a_small_rate_moves_bfloat16_weights(parallelism, two, folders, uneven_file, tmp_path):
    model = folders("qwen3-moe")
    settings = {"model": {"dtype": "bfloat16"}, "training": {**STEPS, "preflight": True}, "optimizer": {"lr": 1e-6}}
    together = two.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    assert together[0].get("status") == "finished", together[0]
    before, after = weights(model), weights(together[0]["model_path"])
    # Adam moves each weight by about the rate; bfloat16 by itself would round that to nothing.
    asked = [name for name in before if "experts" not in name]  # one to which no token is sent stays
    still = [name for name in asked if not (before[name].bfloat16().float() != after[name]).any()]
    assert not still


@pytest.mark.slow
def test_the_loss_of_each_source_is_told_where_packs_lie_on_two_processes(two, folders, uneven_file, tmp_path):
    lines, files = uneven_file.read_text().splitlines(keepends=True), []
    for name, part in (("short.jsonl", lines[:10]), ("long.jsonl", lines[10:])):
        files.append(tmp_path / name)
        files[-1].write_text("".join(part))
    settings = {"training": STEPS, "optimizer": SGD, "data": {"path": [str(file) for file in files]}}
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **settings)
    together = two.train(folders("llama"), uneven_file, tmp_path / "together", parallelism=CONTEXT, **settings)
    same_steps(alone, together)
    for row, wanted in zip(together[0]["history"], alone.history, strict=True):
        for key in ("source_loss/short.jsonl", "source_loss/long.jsonl"):
            assert row.get(key) == pytest.approx(wanted.get(key), rel=CLOSE)
    assert any("source_loss/short.jsonl" in row for row in alone.history)
