"""What else trains beside a divided model: adapters on quantised bases, ranks that move, rounding, answers.

Float32, plain SGD, as in test_equal_numbers.py, whose reasons for both hold here.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.distributed.lacking import lacks_slices
from tests.distributed.test_equal_numbers import SGD, STEPS, apart, same_steps, weights
from tests.invariants.run import train
from training_hub.evaluation.predictions import read_predictions

CLOSE = 1e-5
SLICES = {"data_parallel_shard_degree": -1}
TOKENS = {"context_parallel_degree": 2}
HEADS = {"tensor_parallel_degree": 2}
STAGES = {"pipeline_parallel_degree": 2}
PAIRS = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}


@pytest.fixture(scope="module")
def wide_model_folder(tiny_model_folder, tmp_path_factory) -> Path:
    """The tiny model at width 64, so that rows are whole blocks of NF4 and groups of 32."""
    import torch

    folder = tmp_path_factory.mktemp("wide") / "model"
    config = AutoConfig.from_pretrained(tiny_model_folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def needs(package: str) -> Any:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"no {package}")


# The largest number of each group lies on a border between two codes, so that from the second step on a difference of
# rounding becomes one of a code.
ROUNDED = {"qat": {"weight_dtype": "int4"}, "training": {**STEPS, "steps": 1}, "data": {}}
WITH_INPUTS = {**ROUNDED, "qat": {"weight_dtype": "int4", "activation_dtype": "int8"}}
LORA = {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int4": (SLICES, {**LORA, "model": {"quantization": "int4"}}),
    "int8": (SLICES, {**LORA, "model": {"quantization": "int8"}}),
    "adalora": (
        SLICES,
        {"algorithm": "lora_sft", "lora": {"tuner": "adalora", "r": 2, "options": {"init_r": 4, "tfinal": 1}}},
    ),
    "rounded": (SLICES, ROUNDED),
    "int4, replicas": ({}, {**LORA, "model": {"quantization": "int4"}}),
    "int8, replicas": ({}, {**LORA, "model": {"quantization": "int8"}}),
    "int4, tokens": (TOKENS, {**LORA, "model": {"quantization": "int4"}}),
    "adalora, tokens": (
        TOKENS,
        {"algorithm": "lora_sft", "lora": {"tuner": "adalora", "r": 2, "options": {"init_r": 4, "tfinal": 1}}},
    ),
    "rounded, tokens": (TOKENS, ROUNDED),
    "unfrozen in turn": (SLICES, {"freezing": {"unfreeze_interval": 2}}),
    "unfrozen in turn, heads": (HEADS, {"freezing": {"unfreeze_interval": 2}}),
    "rounded adapter": (SLICES, {**LORA, **ROUNDED}),
    "rounded, heads": (HEADS, ROUNDED),
    "rounded, heads, all tokens in each": ({**HEADS, "sequence_parallel": False}, ROUNDED),
    "rounded adapter, heads": (HEADS, {**LORA, **ROUNDED}),
    "rounded to 8 bits, heads": (HEADS, {**ROUNDED, "qat": {"weight_dtype": "int8", "group_size": 16}}),
}
LIBRARIES = {"int4": "bitsandbytes", "int8": "torchao", "rounded": "torchao", "adalora": "peft", "unfrozen": "torch"}
QUICK = ("int4", "adalora", "rounded")


def marked(case: str) -> Any:
    slow = [] if case in QUICK else [pytest.mark.slow]
    return pytest.param(case, marks=[needs(LIBRARIES[case.partition(",")[0].partition(" ")[0]]), *slow])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_two_processes_find_the_numbers_of_one(case, two, wide_model_folder, uneven_file, tmp_path):
    parallelism, sections = CASES[case]
    settings = {"training": STEPS, "optimizer": SGD, "data": {"validation_fraction": 0.2}, **sections}
    together = two.train(wide_model_folder, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    if lacks_slices(together, two, parallelism, sections):
        return
    alone = train(wide_model_folder, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    name = "adapter_model" if "algorithm" in sections else "model"
    assert apart(weights(alone.model_path, name), weights(together[0]["model_path"], name)) <= CLOSE


@needs("torchao")
def test_inputs_that_lie_in_several_processes_are_rounded_together(two):
    """Sums of 64 numbers in another order; rounded by themselves, the smaller inputs would have finer codes."""
    each = two.call("tests.distributed.rounding_inputs:apart")
    assert max(one.pop("alone") for one in each) > 1e-3
    assert max(number for one in each for number in one.values()) < 1e-6, each


WAYS_OF_INPUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "heads": ("two", HEADS, {}),
    "heads, all tokens in each": ("two", {**HEADS, "sequence_parallel": False}, {}),
    "heads, an adapter": ("two", HEADS, LORA),
    "slices of heads": ("four", {**HEADS, "data_parallel_shard_degree": 2}, {}),
    "stages of heads": ("four", {**HEADS, **STAGES}, {}),
}


@pytest.mark.slow
@needs("torchao")
@pytest.mark.parametrize("case", WAYS_OF_INPUTS)
def test_a_model_that_rounds_inputs_is_split(case, request, wide_model_folder, uneven_file, tmp_path):
    """In one process noise of 1e-7 in what layers give makes other codes here and there, and a loss that is another by
    up to 2e-4."""
    crew, parallelism, sections = WAYS_OF_INPUTS[case]
    settings = {"optimizer": {**SGD, "lr": 0.01}, **WITH_INPUTS, **sections}
    crew = request.getfixturevalue(crew)
    together = crew.train(wide_model_folder, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    alone = train(wide_model_folder, uneven_file, tmp_path / "alone", **settings)
    for each in together:
        assert each.get("status") == "finished", each
        assert each["history"][0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-3)
        assert each["history"][0]["grad_norm"] == pytest.approx(alone.history[0]["grad_norm"], rel=1e-2)


IN_BFLOAT16: dict[str, dict[str, Any]] = {
    "int4": {**LORA, "model": {"quantization": "int4", "dtype": "bfloat16"}},
    "int8": {**LORA, "model": {"quantization": "int8", "dtype": "bfloat16"}},
    "adalora": {**CASES["adalora"][1], "model": {"dtype": "bfloat16"}},
    "rounded": {"qat": {"weight_dtype": "int4"}, "model": {"dtype": "bfloat16"}},
    "muon": {"optimizer": {"name": "Muon", "lr": 1e-3}, "model": {"dtype": "bfloat16"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_slices_in_bfloat16_follow_one_process(case, two, wide_model_folder, uneven_file, tmp_path):
    """8 bits of mantissa, and sums in another order: losses agree to 2 %."""
    package = LIBRARIES.get(case, "torch")
    if find_spec(package) is None:
        pytest.skip(f"no {package}")
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": ANSWERS["evaluation"], **IN_BFLOAT16[case]}
    settings["data"] = {"validation_fraction": 0.2}
    together = two.train(wide_model_folder, uneven_file, tmp_path / "together", parallelism=SLICES, **settings)
    if lacks_slices(together, two, SLICES, settings):
        return
    alone = train(wide_model_folder, uneven_file, tmp_path / "alone", **settings)
    for each in together:
        assert each.get("status") == "finished", each
        for row, wanted in zip(each["history"], alone.history, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=0.02)


ANSWERS = {
    "training": {**STEPS, "steps": 2},
    "optimizer": SGD,
    "data": {"validation_fraction": 0.2},
    "evaluation": {"generate": 7, "max_new_tokens": 6, "interval": 1},
}


def said(folder: Path) -> list[Any]:
    return [read_predictions(folder / "predictions" / f"step-{step}.jsonl") for step in (0, 1, 2)]


@pytest.mark.parametrize(
    "parallelism", [{}, SLICES, HEADS, STAGES, pytest.param(TOKENS, marks=pytest.mark.slow)], ids=json.dumps
)
def test_questions_are_shared_out_and_answered_as_in_one_process(
    parallelism, two, tiny_model_folder, chat_file, tmp_path
):
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", **ANSWERS)
    together = two.train(tiny_model_folder, chat_file, tmp_path / "together", parallelism=parallelism, **ANSWERS)
    same_steps(alone, together)
    assert said(tmp_path / "together") == said(tmp_path / "alone")
    for each in together:
        assert each["metrics"]["validation_answer_tokens"] == alone.metrics["validation_answer_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism",
    [
        PAIRS,
        {**HEADS, "data_parallel_shard_degree": 2},
        {**TOKENS, **HEADS},
        STAGES,
        {**STAGES, **HEADS},
        {**STAGES, **TOKENS},
        {**STAGES, "data_parallel_shard_degree": 2},
    ],
    ids=json.dumps,
)
def test_four_processes_answer_so_too(parallelism, four, tiny_model_folder, chat_file, tmp_path):
    train(tiny_model_folder, chat_file, tmp_path / "alone", **ANSWERS)
    together = four.train(tiny_model_folder, chat_file, tmp_path / "together", parallelism=parallelism, **ANSWERS)
    assert [each.get("status") for each in together] == ["finished"] * 4, together
    assert said(tmp_path / "together") == said(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_stages_answer_whatever_their_layers_keep(family, two, folders, chat_file, tmp_path):
    """Of a window its tokens, of latent attention what keys and values are made of."""
    asked = {**ANSWERS, "evaluation": {**ANSWERS["evaluation"], "max_new_tokens": 12}}
    train(folders(family), chat_file, tmp_path / "alone", **asked)
    together = two.train(folders(family), chat_file, tmp_path / "together", parallelism=STAGES, **asked)
    assert [each.get("status") for each in together] == ["finished"] * 2, together
    assert said(tmp_path / "together") == said(tmp_path / "alone")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3-moe"])
def test_stages_answer_prompts_of_several_lengths_at_once(family, two):
    assert two.call("tests.distributed.answering:pads", family) == [True, True]


KEPT_WHOLE = {
    "muon": {"name": "Muon", "lr": 1e-3},
    "moments in bytes": {"name": "AdamW", "state": "8bit", "lr": 1e-3},
}


@pytest.mark.parametrize("case", [*KEPT_WHOLE])
def test_what_owners_keep_goes_on_in_any_layout(case, two, wide_model_folder, uneven_file, tmp_path):
    """Gradients differ by rounding, which 8-bit codes and 16-bit products make something of: losses agree to 1e-4."""
    settings = {
        "training": {"global_batch_size": 8, "epochs": 1, "preflight": False},
        "optimizer": KEPT_WHOLE[case],
        "checkpoint": {"interval": 1},
    }
    unbroken = train(wide_model_folder, uneven_file, tmp_path / "unbroken", **settings)
    output, folder = tmp_path / "run", wide_model_folder
    order = {"signalled": 1, "step": 1}
    for parallelism in (SLICES, HEADS):
        ended = two.train(folder, uneven_file, output, order, parallelism=parallelism, **settings)
        assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended
        order = {"signalled": 0, "step": 3}
    resumed = train(folder, uneven_file, output, **settings)
    assert len(resumed.history) == len(unbroken.history) == 5
    for row, wanted in zip(resumed.history, unbroken.history, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
