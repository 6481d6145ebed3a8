"""A quantised base is read and quantised matrix by matrix, by processes of which none holds all of it."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.lacking import lacks_slices
from tests.distributed.test_equal_numbers import SGD, STEPS
from tests.invariants.run import recipe

pytest.importorskip("peft")

SLICES = {"data_parallel_shard_degree": -1}
PAIRS = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
STAGES = {"pipeline_parallel_degree": 2}
HEADS = {"tensor_parallel_degree": 2}
EXPERTS = {"data_parallel_shard_degree": 2, "expert_parallel_degree": 2}
LORA = {"r": 4, "dropout": 0.0, "target_modules": ["q_proj", "o_proj"]}
SHAPE = {"num_hidden_layers": 8, "intermediate_size": 50}
"""Half of a matrix of 50 x 32 is 12.5 blocks of NF4."""
HALVES = {**SHAPE, "hidden_size": 128, "intermediate_size": 256}
"""Half of a row is a block of NF4, or two."""

Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "int4, slices": ("llama", SLICES, {"quantization": "int4"}),
    "int8, slices": ("llama", SLICES, {"quantization": "int8"}),
    "int4, slices, in 16 bits": ("llama-tied", SLICES, {"quantization": "int4", "dtype": "bfloat16"}),
    "int8, slices, in 16 bits": ("llama-tied", SLICES, {"quantization": "int8", "dtype": "bfloat16"}),
    "int4, stages": ("qwen2", STAGES, {"quantization": "int4"}),
    "int8, stages": ("qwen2", STAGES, {"quantization": "int8"}),
    "int4, experts": ("qwen3-moe", EXPERTS, {"quantization": "int4"}),
    "int4, slices, turned": ("gpt2", SLICES, {"quantization": "int4"}),
    "int4, heads": ("llama", HEADS, {"quantization": "int4"}),
    "int8, heads": ("qwen2", HEADS, {"quantization": "int8"}),
}
FOUR: dict[str, Case] = {
    "int4, replicas of slices": ("llama", PAIRS, {"quantization": "int4"}),
    "int8, slices": ("llama", SLICES, {"quantization": "int8"}),
    "int4, stages of slices": ("llama", {**STAGES, "data_parallel_shard_degree": 2}, {"quantization": "int4"}),
    "int4, experts of slices": ("qwen3-moe", {**EXPERTS, "data_parallel_shard_degree": 4}, {"quantization": "int4"}),
}
QUICK = ("int4, slices, turned", "int4, slices, in 16 bits", "int8, slices", "int4, stages", "int4, heads")
LIBRARIES = {"int4": "bitsandbytes", "int8": "torchao"}


def marked(case: str) -> Any:
    return pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow])


def read_by(crew: Any, model: Any, rows: Any, output: Any, parallelism: dict[str, Any], chosen: dict[str, Any]) -> Any:
    pytest.importorskip(LIBRARIES[chosen["quantization"]])
    is_turned = json.loads((model / "config.json").read_text())["model_type"] == "gpt2"
    lora = {**LORA, "target_modules": ["c_attn"]} if is_turned else LORA
    settings = {"algorithm": "lora_sft", "lora": lora, "training": STEPS, "optimizer": SGD, "model": chosen}
    if lacks_slices([REFUSED], crew, parallelism, settings):
        pytest.skip("this torch makes no slices of bytes")
    asked = recipe(model, rows, output, parallelism=parallelism, **settings).model_dump(mode="json")
    return crew.call("tests.distributed.low_bits:read_in_turns", asked)


REFUSED = {"error": "RecipeError", "problems": ["makes no slices of"]}


def bits_of_one(each: list[dict[str, Any]]) -> None:
    for one in each:
        assert one["layers"] > 4 and one["unlike"] == [] and one["broken"] == []


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_the_bits_are_those_of_one_process(case, two, folders, uneven_file, tmp_path):
    family, parallelism, chosen = CASES[case]
    model = folders(family, **(HALVES if "heads" in case else SHAPE))
    bits_of_one(read_by(two, model, uneven_file, tmp_path / "run", parallelism, chosen))


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_find_them_too(case, four, folders, uneven_file, tmp_path):
    family, parallelism, chosen = FOUR[case]
    model = folders(family, **SHAPE)
    bits_of_one(read_by(four, model, uneven_file, tmp_path / "run", parallelism, chosen))


@pytest.mark.slow
def test_uneven_turns_end_together(three, folders, uneven_file, tmp_path):
    """16 layers of 7 matrices are 37 turns of three and one of one."""
    model = folders("llama", num_hidden_layers=16)
    bits_of_one(read_by(three, model, uneven_file, tmp_path / "run", SLICES, {"quantization": "int4"}))


@pytest.mark.parametrize("kind", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_no_process_holds_more_than_its_slices_and_a_few_matrices(kind, two, folders, uneven_file, tmp_path):
    """A dense one as the file has it, its absolute values and which of them are finite or belong to which code: four
    times the largest; the quantised base alone would be more."""
    model = folders("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=24, vocab_size=256)
    each = read_by(two, model, uneven_file, tmp_path / "run", SLICES, {"quantization": kind})
    bits_of_one(each)
    for one in each:
        assert one["rise"] < one["own"] + 4 * one["largest"] < one["own"] + one["low"]


def test_weights_that_are_not_finite_are_named(two, folders, uneven_file, tmp_path):
    model = shutil.copytree(folders("llama", **SHAPE), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][7, 7] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    chosen = {"quantization": "int4"}
    each = two.train(model, uneven_file, tmp_path / "run", algorithm="lora_sft", parallelism=SLICES, model=chosen)
    if lacks_slices(each, two, SLICES, {"model": chosen}):
        return
    for one in each:
        assert one["error"] == "TrainingError", one
        assert "model.layers.3.mlp.up_proj.weight holds 1 numbers that are not finite" in one["problems"]
