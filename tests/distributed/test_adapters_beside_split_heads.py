"""An adapter learns beside heads and widths that are split what it learns beside whole ones, on quantised weights too.

Float32 and plain SGD at a small rate, for the reasons that test_pipeline.py gives; 1e-5 as for all that is split. Codes
and scales of a part are those of the whole weight, so that quantised weights allow the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.lacking import lacks_slices
from tests.distributed.test_divided_further import needs
from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_pipeline import CLOSE, SGD, roughly_same_steps
from tests.distributed.test_pipeline_adapters import LONGER, broken_off
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import recipe, train
from training_hub.backends.torch_engine.planning.memory import GIB
from training_hub.backends.torch_engine.planning.plan import plan
from training_hub.monitoring.console import open_console

HEADS = {"tensor_parallel_degree": 2}
ALL_TOKENS = {**HEADS, "sequence_parallel": False}
SLICES = {**HEADS, "data_parallel_shard_degree": 2}
STAGES = {**HEADS, "pipeline_parallel_degree": 2}
BACK = {**STAGES, "pipeline_parallel_schedule": "ZBVZeroBubble"}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""A half of a row is whole blocks of NF4."""

LORA = {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}
INT4: dict[str, Any] = {**LORA, "model": {"quantization": "int4"}}
INT8: dict[str, Any] = {**LORA, "model": {"quantization": "int8"}}
DORA: dict[str, Any] = {"algorithm": "lora_sft", "lora": {**LORA["lora"], "tuner": "dora"}}
LIBRARIES = {"int4": "bitsandbytes", "int8": "torchao", "dora": "peft"}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "int4": ("llama", HEADS, INT4),
    "int8": ("qwen2", ALL_TOKENS, INT8),
    "dora": ("qwen2", HEADS, DORA),
}
MORE: dict[str, Case] = {
    "int4, all tokens in each": ("qwen3", ALL_TOKENS, INT4),
    "int4, biases": ("qwen2", HEADS, INT4),
    "int4, with proofs": ("llama", HEADS, {**INT4, "training": {**STEPS, "preflight": True}}),
    "int4, layers made again": ("llama", HEADS, {**INT4, "training": {**STEPS, "activation_checkpointing": "full"}}),
    "int4, experts": ("qwen3-moe", HEADS, {**INT4, "lora": {**LORA["lora"], "target_modules": ["q_proj", "o_proj"]}}),
    "int4, a table that is also the head": ("llama-tied", HEADS, INT4),
    "int8, slices of tokens": ("llama", HEADS, INT8),
    "dora, all tokens in each": ("llama", ALL_TOKENS, DORA),
    "dora, with proofs": ("qwen3", HEADS, {**DORA, "training": {**STEPS, "preflight": True}}),
    "dora, layers made again": ("llama", HEADS, {**DORA, "training": {**STEPS, "activation_checkpointing": "full"}}),
    "dora, int4": ("llama", HEADS, {**INT4, **DORA}),
    "dora, int8": ("qwen2", ALL_TOKENS, {**INT8, **DORA}),
    "int8, with proofs": ("llama", HEADS, {**INT8, "training": {**STEPS, "preflight": True}}),
}


def marked(cases: dict[str, Case], *others: Any) -> list[Any]:
    return [pytest.param(case, marks=[needs(LIBRARIES[case.partition(",")[0]]), *others]) for case in cases]


def settings_of(sections: dict[str, Any]) -> dict[str, Any]:
    return {"training": STEPS, "optimizer": SGD, "data": {"validation_fraction": 0.2}, **sections}


def same_adapters(alone: Any, together: list[dict[str, Any]]) -> None:
    found = weights(together[0]["model_path"], "adapter_model")
    wanted = weights(alone.model_path, "adapter_model")
    assert found.keys() == wanted.keys()
    assert apart(wanted, found) <= CLOSE


@pytest.mark.parametrize("case", [*marked(CASES), *marked(MORE, pytest.mark.slow)])
def test_two_processes_find_the_numbers_of_one(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE}[case]
    settings, model = settings_of(sections), folders(family, **WIDE)
    together = two.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_adapters(alone, together)


PRODUCTS: dict[str, Case] = {
    "int4, slices": ("llama", SLICES, INT4),
    "int8, slices": ("llama", SLICES, INT8),
    "int4, stages": ("llama", STAGES, INT4),
    "int4, stages there and back": ("llama-tied", BACK, INT4),
    "int8, stages": ("llama", STAGES, INT8),
    "dora, slices": ("qwen2", SLICES, DORA),
    "dora, stages": ("llama", STAGES, DORA),
    "dora, stages there and back": ("llama-tied", BACK, DORA),
    "dora, int4, slices": ("llama", SLICES, {**INT4, **DORA}),
    "int4, tokens": ("llama", {**HEADS, "context_parallel_degree": 2}, INT4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", marked(PRODUCTS))
def test_four_processes_find_them_by_two_ways_at_once(case, four, folders, uneven_file, tmp_path):
    family, parallelism, sections = PRODUCTS[case]
    model = folders(family, **WIDE, **({"num_hidden_layers": 4} if "back" in case else {}))
    settings = settings_of(sections)
    together = four.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    if lacks_slices(together, four, parallelism, sections):
        return
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_adapters(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*marked(CASES), *marked({key: MORE[key] for key in ("dora, int4", "dora, int8")})])
def test_steps_in_16_bits_are_roughly_those_of_one(case, two, folders, uneven_file, tmp_path):
    """Of the gradients of this model, whose weights are large, 16 bits take up to a tenth in one process as well."""
    family, parallelism, sections = {**CASES, **MORE}[case]
    settings, model = settings_of(sections), folders(family, **WIDE)
    settings["model"] = {**settings.get("model", {}), "dtype": "bfloat16"}
    together = two.train(model, uneven_file, tmp_path / "together", parallelism=parallelism, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    roughly_same_steps(alone, together, "loss")
    for row, wanted in zip(together[0]["history"], alone.history, strict=True):
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.15)


MOVED: dict[str, dict[str, Any]] = {"int4": INT4, "int8": INT8, "dora": DORA}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[needs(LIBRARIES[kind]), pytest.mark.slow]) for kind in MOVED]
)
def test_it_goes_on_in_other_layouts_and_is_merged(kind, two, folders, uneven_file, tmp_path):
    """Broken off with split heads, in one process, and as replicas, it ends with split heads. At ten times the rate
    what rounding makes grows with the ten steps of lengths."""
    settings = {**MOVED[kind], **LONGER, "optimizer": {**LONGER["optimizer"], "lr": 1e-3}}
    settings["lora"] = {**settings["lora"], "merge": True}
    ways = [HEADS, {}, ALL_TOKENS]
    unbroken, resumed = broken_off(two, folders("llama", **WIDE), uneven_file, tmp_path, settings, ways)
    same_adapters(unbroken, resumed)
    merged = [Path(one).parent / "merged" for one in (unbroken.model_path, resumed[0]["model_path"])]
    assert apart(*map(weights, merged)) <= CLOSE


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(LIBRARIES[kind])) for kind in ("int4", "int8")])
def test_a_process_holds_of_quantised_weights_what_is_planned(kind, two, folders, uneven_file, tmp_path):
    """But for 1 % at this width: a scale for each row of int8, and for each layer int4's table of codes of scales."""
    asked = recipe(
        folders("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=1),
        uneven_file,
        tmp_path / "out",
        parallelism=HEADS,
        processes={"procs": 2},
        **{**LORA, "model": {"quantization": kind, "dtype": "float32"}},
    )
    planned = plan(asked, open_console("off"), measures=False)["memory_gib"]["weights"] * GIB
    for each in two.call("tests.distributed.measuring:held_in_run", asked.model_dump(mode="json")):
        assert each["weights"] == pytest.approx(planned, rel=0.015)
