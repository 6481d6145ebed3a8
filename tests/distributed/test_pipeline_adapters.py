"""Adapters beside a model in stages learn what they do beside a whole one, and their file is that of one process.

Float32 and plain SGD at a small rate, for the reasons that test_pipeline.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.crew import Crew
from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_pipeline import CLOSE, SGD, SMALL_PACKS, TWO, roughly_same_steps
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.launch import run

LORA = {"r": 4, "dropout": 0.0}
ON_TABLES = {
    "lora": {**LORA, "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    "optimizer": {**SGD, "lr": 1e-3},
}
"""At ten times the rate the norm of gradients doubles in four steps, and with it what rounding makes."""

OF_LAYER = {"target_modules": ["q_proj", "down_proj"]}
BACK = {"pipeline_parallel_schedule": "ZBVZeroBubble"}
INTERLEAVED = {"pipeline_parallel_schedule": "Interleaved1F1B"}
HEADS = {"tensor_parallel_degree": 2}
TOKENS = {"context_parallel_degree": 2}
EXPERTS = {"data_parallel_shard_degree": 2, "expert_parallel_degree": 2}
FOUR_LAYERS = {"num_hidden_layers": 4}

ROWS = {"lora": {**LORA, "trainable_tokens": [43, 86]}}
COPY = {"lora": {**LORA, "modules_to_save": ["embed_tokens"]}}
IN_FIRST = {"lora": {**LORA, **OF_LAYER, "options": {"layers_to_transform": [0]}}}
PROVEN = {"lora": LORA, "training": {**SMALL_PACKS, "preflight": True}}
IN_LAST = {"options": {"init_r": 4, "tfinal": 1, "layers_to_transform": [3]}}
ADALORA = {"lora": {"tuner": "adalora", "r": 2, "options": {"init_r": 4, "tfinal": 1}}}
BESIDE_EXPERTS = {**LORA, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "one forward, one backward": ("qwen3", {}, {"lora": LORA}),
}

MORE_CASES: dict[str, Case] = {
    "stages there and back, gradients of weights made later": ("llama", BACK, {"lora": LORA}),
    "two stages in each process, gradients made later": (
        "qwen3",
        {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
        {"lora": LORA},
    ),
    "fewer packs than stages": ("llama-tied", {}, {"lora": LORA, "training": STEPS}),
    "one document after another": ("llama", {}, {"lora": LORA, "data": {"packing": False}}),
    "on table and head": ("llama", {}, ON_TABLES),
    "on table and head, there and back": ("llama", BACK, ON_TABLES),
    "rows of a table that is also the head": ("llama-tied", {}, ROWS),
    "a copy of the table that trains": ("llama", {}, COPY),
    "in the last layer alone": ("llama", {}, {"lora": {**LORA, **OF_LAYER, "options": {"layers_to_transform": [3]}}}),
    "in the first layer alone": ("llama", BACK, IN_FIRST),
    **{f"an adapter of {tuner}": ("llama", {}, {"lora": {**LORA, "tuner": tuner}}) for tuner in ("dora", "pissa")},
    "on experts": ("qwen3-moe", {}, {"lora": LORA}),
    "an adapter of another kind": ("llama", {}, {"lora": {"r": 4, "tuner": "loha"}}),
    "ranks shared out over all layers": ("llama", {}, ADALORA),
    "ranks shared out, there and back": ("qwen3", BACK, ADALORA),
    "ranks shared out, with proofs": ("llama", {}, {**PROVEN, **ADALORA}),
    "ranks shared out in the last layer alone": ("llama", {}, {"lora": {**ADALORA["lora"], **OF_LAYER, **IN_LAST}}),
    "with proofs": ("llama", {}, PROVEN),
    "layers made again": (
        "qwen3",
        BACK,
        {"lora": LORA, "training": {**SMALL_PACKS, "activation_checkpointing": "full"}},
    ),
}

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES]


def settings_of(sections: dict[str, Any]) -> dict[str, Any]:
    settings = {"algorithm": "lora_sft", "training": SMALL_PACKS, "optimizer": SGD, **sections}
    return {**settings, "evaluation": {"interval": 2}, "data": {"validation_fraction": 0.2, **settings.get("data", {})}}


def same_adapter(alone: Any, together: list[dict[str, Any]]) -> None:
    """The same tensors by the same names, and the same configuration but for where the base lies."""
    folders = Path(alone.model_path), Path(together[0]["model_path"])
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in wanted.items()}
    assert apart(wanted, found) <= CLOSE
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_an_adapter_in_stages_is_that_of_one_process(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    settings, model = settings_of(sections), folders(family, **FOUR_LAYERS)
    together = two.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_adapter(alone, together)


PRODUCTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two pipelines of two": ("llama-tied", {}, {"lora": LORA}),
    "two pipelines there and back, on tables": ("llama", BACK, ON_TABLES),
    "a pipeline of four": ("qwen3", {"pipeline_parallel_degree": 4}, {"lora": LORA}),
    "a pipeline of slices of weights": ("qwen3", {"data_parallel_shard_degree": 2}, {"lora": LORA}),
    "stages of split heads": ("qwen3", HEADS, {"lora": LORA}),
    "stages of split heads, gradients made later": ("llama", {**HEADS, **BACK}, {"lora": LORA}),
    "stages of split heads, two in each process": ("llama-tied", {**HEADS, **INTERLEAVED}, {"lora": LORA}),
    "stages of split heads, all tokens in each": ("qwen3", {**HEADS, "sequence_parallel": False}, {"lora": LORA}),
    "stages of split heads, all linear layers": ("phi3", HEADS, {"lora": {**LORA, "tuner": "rslora"}}),
    "stages of split heads, on table and head": ("llama", HEADS, ON_TABLES),
    "stages of split heads, rows of a table": ("llama", HEADS, ROWS),
    "stages of split heads, a copy of the table that trains": ("llama", HEADS, COPY),
    "stages of split heads, in the first layer alone": ("llama", HEADS, IN_FIRST),
    "stages of split heads, with proofs": ("llama", HEADS, PROVEN),
    "stages of split tokens": ("llama-tied", TOKENS, {"lora": LORA}),
    "stages of split tokens, there and back, on table and head": ("llama", {**TOKENS, **BACK}, ON_TABLES),
    "stages of split tokens, an adapter of dora": ("llama", TOKENS, {"lora": {**LORA, "tuner": "dora"}}),
    "stages of split tokens, an adapter of pissa": ("llama", TOKENS, {"lora": {**LORA, "tuner": "pissa"}}),
    "stages of split tokens, with proofs": ("qwen3", TOKENS, PROVEN),
    "stages of split tokens, on experts": ("mixtral", TOKENS, {"lora": LORA}),
    "slices, on experts": ("qwen3-moe", {"data_parallel_shard_degree": 2}, {"lora": LORA}),
    "stages of experts": ("qwen3-moe", EXPERTS, {"lora": BESIDE_EXPERTS}),
    "stages of experts among heads": ("qwen3-moe", {**HEADS, "expert_parallel_degree": 2}, {"lora": BESIDE_EXPERTS}),
    "stages of experts among tokens": ("mixtral", {**TOKENS, "expert_parallel_degree": 2}, {"lora": BESIDE_EXPERTS}),
    "two pipelines, ranks shared out": ("llama", {}, ADALORA),
    "a pipeline of four, ranks shared out": ("qwen3", {"pipeline_parallel_degree": 4}, ADALORA),
    "slices, ranks shared out": ("llama", {"data_parallel_shard_degree": 2}, ADALORA),
    "stages of split tokens, ranks shared out": ("llama", TOKENS, ADALORA),
    "slices, on table and head": ("llama", {"data_parallel_shard_degree": 2}, ON_TABLES),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_four_processes_find_it_in_pipelines_side_by_side(case, four, folders, uneven_file, tmp_path):
    family, parallelism, sections = PRODUCTS[case]
    settings, model = settings_of(sections), folders(family, **FOUR_LAYERS)
    together = four.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_adapter(alone, together)


LONGER = {
    "training": {"global_batch_size": 4, "epochs": 1, "preflight": False, "max_tokens_per_gpu": 256},
    "optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9},
    "checkpoint": {"interval": 1},
}


WAYS_OF_TWO = [TWO, {}, {**TWO, **INTERLEAVED}]
WAYS_OF_FOUR = [{**TWO, **HEADS}, {"data_parallel_shard_degree": 4}, {**TWO, **TOKENS}]


def broken_off(
    crew: Crew,
    model: Path,
    rows: Path,
    folder: Path,
    settings: dict[str, Any],
    ways: Sequence[dict[str, Any]] = WAYS_OF_TWO,
) -> tuple[Any, list[dict]]:
    """What a run gives in one process, and what one gives that is broken off in the first of three layouts, in one
    process and in the second layout, and ends in the third: the same steps."""
    unbroken, output = train(model, rows, folder / "unbroken", **settings), folder / "run"

    def go_on(parallelism: dict[str, Any], step: int) -> None:
        order = {"signalled": 1, "step": step}
        ended = crew.train(model, rows, output, order, parallelism=parallelism, **settings)
        assert {each.get("error") for each in ended} == {"Interrupted"}, ended

    def stop(report: Any) -> None:
        raise KeyError("the plug was pulled")

    go_on(ways[0], 2)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        run(recipe(model, rows, output, **settings), Given(watchers=[stop]))
    go_on(ways[1], 5)
    resumed = crew.train(model, rows, output, parallelism=ways[2], **settings)
    same_steps(unbroken, resumed)
    return unbroken, resumed


@pytest.mark.slow
@pytest.mark.parametrize(("crew", "ways"), [("two", WAYS_OF_TWO), ("four", WAYS_OF_FOUR)], ids=["two", "four"])
def test_an_adapter_goes_on_in_stages_and_without_and_is_merged(crew, ways, request, folders, uneven_file, tmp_path):
    settings = {"algorithm": "lora_sft", "lora": {**LORA, "merge": True}, **LONGER}
    model = folders("llama-tied", **FOUR_LAYERS)
    some = request.getfixturevalue(crew)
    unbroken, resumed = broken_off(some, model, uneven_file, tmp_path, settings, ways)
    same_adapter(unbroken, resumed)
    merged = [Path(one).parent / "merged" for one in (unbroken.model_path, resumed[0]["model_path"])]
    assert apart(*map(weights, merged)) <= CLOSE


@pytest.mark.slow
def test_ranks_are_shared_out_on_in_stages_and_without(two, folders, uneven_file, tmp_path):
    settings = {"algorithm": "lora_sft", **ADALORA, **LONGER}
    unbroken, resumed = broken_off(two, folders("llama", **FOUR_LAYERS), uneven_file, tmp_path, settings)
    same_adapter(unbroken, resumed)
    key = "adapter_mean_rank"
    assert [row[key] for row in resumed[0]["history"]] == [row[key] for row in unbroken.history]


@pytest.mark.slow
def test_bfloat16_stages_train_an_adapter_too(two, folders, uneven_file, tmp_path):
    settings = settings_of({"lora": LORA, "model": {"dtype": "bfloat16"}})
    model = folders("qwen3", **FOUR_LAYERS)
    together = two.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **BACK}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    roughly_same_steps(alone, together, "loss")
    both = Path(alone.model_path), Path(together[0]["model_path"])
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in both)
    assert found.keys() == wanted.keys()
