"""What else trains in stages: beside a teacher, with noise, unfrozen in turn, on quantised weights, rounded.

Float32 and plain SGD at a small rate, for the reasons that test_pipeline.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_divided_further import ROUNDED, needs
from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_pipeline import CLOSE, SGD, SMALL_PACKS, TWO
from tests.distributed.test_pipeline_adapters import (
    BACK,
    BESIDE_EXPERTS,
    EXPERTS,
    FOUR_LAYERS,
    HEADS,
    LONGER,
    TOKENS,
    WAYS_OF_FOUR,
    WAYS_OF_TWO,
    broken_off,
)
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import train

INTERLEAVED = {"pipeline_parallel_schedule": "InterleavedZeroBubble"}
WIDE = {**FOUR_LAYERS, "hidden_size": 64, "intermediate_size": 128}
"""Rows are whole blocks of NF4 and groups of 32."""

LORA = {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}
BESIDE = {"algorithm": "lora_sft", "lora": BESIDE_EXPERTS}
WHOLE_LOSS = {**HEADS, "disable_loss_parallel": True}
TEACHER = {"teacher": "another", "alpha": 0.5}
NOISE = {"loss": {"neftune_noise_alpha": 5.0}}
IN_TURN = {"freezing": {"unfreeze_interval": 1}, "optimizer": {**SGD, "weight_decay": 0.1}}
"""What does not train yet does not decay."""
ONE_STEP = {"training": {**SMALL_PACKS, "steps": 1}, "data": {}}
UNASKED = {**ONE_STEP, "data": {"validation_fraction": 0.0}, "evaluation": {}}
"""Where heads are split, sums in another order make other codes of the weights that have moved."""

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a teacher": ("llama", {}, {"distillation": TEACHER}),
    "noise": ("llama-tied", {}, NOISE),
    "unfrozen in turn": ("llama-tied", {}, IN_TURN),
}

MORE_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a teacher, there and back": ("llama-tied", BACK, {"distillation": TEACHER}),
    "a teacher, two stages in each process": ("qwen3", INTERLEAVED, {"distillation": {**TEACHER, "alpha": 1.0}}),
    "a teacher, fewer packs than stages": ("llama", {}, {"distillation": TEACHER, "training": STEPS}),
    "a teacher, with proofs": (
        "llama",
        {},
        {"distillation": TEACHER, "training": {**SMALL_PACKS, "preflight": True}},
    ),
    "a teacher that was asked before": ("llama", {}, {"distillation": {**TEACHER, "cache": "top_k", "top_k": 8}}),
    "a teacher, beside an adapter": ("llama", BACK, {**LORA, "distillation": TEACHER}),
    "a head with a bias and a teacher": ("phi", {}, {"distillation": TEACHER}),
    "noise, there and back": ("llama-tied", BACK, NOISE),
    "noise, two stages in each process": ("qwen3", INTERLEAVED, NOISE),
    "noise, beside an adapter, with proofs": (
        "llama",
        {},
        {**LORA, **NOISE, "training": {**SMALL_PACKS, "preflight": True}},
    ),
    "noise and a teacher": ("llama", {}, {**NOISE, "distillation": TEACHER}),
    "unfrozen in turn, there and back": ("llama-tied", BACK, IN_TURN),
    "unfrozen in turn, two stages in each process": ("llama", INTERLEAVED, IN_TURN),
    "rounded": ("llama", {}, {**ROUNDED, **ONE_STEP}),
    "rounded, there and back": ("llama", BACK, {**ROUNDED, **ONE_STEP}),
    "rounded adapter": ("llama", {}, {**LORA, **ROUNDED, **ONE_STEP}),
    "int4": ("llama", {}, {**LORA, "model": {"quantization": "int4"}}),
    "int4, there and back": ("llama", BACK, {**LORA, "model": {"quantization": "int4"}}),
    "int8": ("llama", {}, {**LORA, "model": {"quantization": "int8"}}),
}
LIBRARIES = {"int4": "bitsandbytes", "int8": "torchao", "rounded": "torchao"}


def marked(case: str) -> Any:
    package = LIBRARIES.get(case.partition(",")[0].partition(" ")[0], "torch")
    return pytest.param(case, marks=[needs(package), *([] if case in CASES else [pytest.mark.slow])])


def settings_of(sections: dict[str, Any], folders: Any) -> dict[str, Any]:
    settings = {"training": SMALL_PACKS, "optimizer": SGD, "evaluation": {"interval": 2}, **sections}
    if "distillation" in settings:
        teacher = str(folders("qwen3", hidden_size=48))
        settings["distillation"] = {**settings["distillation"], "teacher": teacher}
    return {**settings, "data": {"validation_fraction": 0.2, **settings.get("data", {})}}


def same_weights(alone: Any, together: list[dict[str, Any]]) -> None:
    name = "adapter_model" if (Path(alone.model_path) / "adapter_model.safetensors").exists() else "model"
    assert apart(weights(alone.model_path, name), weights(together[0]["model_path"], name)) <= CLOSE


@pytest.mark.parametrize("case", [marked(case) for case in (*CASES, *MORE_CASES)])
def test_two_processes_find_the_numbers_of_one(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    settings, model = settings_of(sections, folders), folders(family, **WIDE)
    together = two.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_weights(alone, together)


PRODUCTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a teacher, two pipelines": ("llama", BACK, {"distillation": TEACHER}),
    "a teacher, a pipeline of slices": ("qwen3", {"data_parallel_shard_degree": 2}, {"distillation": TEACHER}),
    "a teacher, stages of split heads": ("llama", WHOLE_LOSS, {"distillation": TEACHER}),
    "a teacher, stages of split heads there and back": (
        "llama-tied",
        {**WHOLE_LOSS, **BACK},
        {"distillation": TEACHER},
    ),
    "a teacher, stages of split heads, all tokens in each": (
        "qwen3",
        {**WHOLE_LOSS, "sequence_parallel": False},
        {"distillation": {**TEACHER, "alpha": 1.0}},
    ),
    "a teacher, stages of split heads, fewer packs than stages": (
        "llama",
        WHOLE_LOSS,
        {"distillation": TEACHER, "training": STEPS},
    ),
    "a teacher, stages of split heads, with proofs": (
        "llama",
        WHOLE_LOSS,
        {"distillation": TEACHER, "training": {**SMALL_PACKS, "preflight": True}},
    ),
    "a teacher, stages of split heads, that was asked before": (
        "llama",
        WHOLE_LOSS,
        {"distillation": {**TEACHER, "cache": "top_k", "top_k": 8}},
    ),
    "a teacher, stages of split heads, beside an adapter": ("llama", WHOLE_LOSS, {**LORA, "distillation": TEACHER}),
    "a teacher, stages of split tokens": ("llama", TOKENS, {"distillation": TEACHER}),
    "a teacher, stages of split tokens, that was asked before": (
        "qwen3",
        {**TOKENS, **BACK},
        {"distillation": {**TEACHER, "cache": "sampled", "samples": 8}},
    ),
    "a teacher, stages of experts": ("qwen3-moe", EXPERTS, {"distillation": TEACHER}),
    "a teacher, stages of experts among heads": (
        "qwen3-moe",
        {**WHOLE_LOSS, "expert_parallel_degree": 2},
        {"distillation": TEACHER},
    ),
    "noise, stages of split heads": ("llama", HEADS, NOISE),
    "noise, stages of split heads there and back": ("llama-tied", {**HEADS, **BACK}, NOISE),
    "noise, stages of split heads, all tokens in each": ("qwen3", {**HEADS, "sequence_parallel": False}, NOISE),
    "noise, stages of split heads, beside an adapter, with proofs": (
        "llama",
        HEADS,
        {**LORA, **NOISE, "training": {**SMALL_PACKS, "preflight": True}},
    ),
    "noise, stages of split tokens": ("llama-tied", TOKENS, NOISE),
    "noise, stages of split tokens there and back": ("qwen3", {**TOKENS, **BACK}, NOISE),
    "noise, stages of experts": ("qwen3-moe", EXPERTS, NOISE),
    "unfrozen in turn, stages of split heads": ("qwen3", HEADS, IN_TURN),
    "unfrozen in turn, stages of split heads there and back": ("llama-tied", {**HEADS, **BACK}, IN_TURN),
    "unfrozen in turn, stages of split tokens": ("llama-tied", TOKENS, IN_TURN),
    "unfrozen in turn, stages of experts": ("qwen3-moe", EXPERTS, IN_TURN),
    "int4, stages of split tokens": ("llama", TOKENS, {**LORA, "model": {"quantization": "int4"}}),
    "int4, stages of split tokens there and back": (
        "llama-tied",
        {**TOKENS, **BACK},
        {**LORA, "model": {"quantization": "int4"}},
    ),
    "int8, stages of split tokens": ("llama", TOKENS, {**LORA, "model": {"quantization": "int8"}}),
    "int4, stages of experts": ("qwen3-moe", EXPERTS, {**BESIDE, "model": {"quantization": "int4"}}),
    "int8, stages of experts": ("qwen3-moe", EXPERTS, {**BESIDE, "model": {"quantization": "int8"}}),
    "rounded, stages of split tokens": ("llama", TOKENS, {**ROUNDED, **ONE_STEP}),
    "rounded, stages of split tokens there and back": ("llama-tied", {**TOKENS, **BACK}, {**ROUNDED, **ONE_STEP}),
    "rounded, stages of split tokens, beside an adapter": ("llama", TOKENS, {**LORA, **ROUNDED, **ONE_STEP}),
    "rounded, stages of split heads": ("llama", HEADS, {**ROUNDED, **UNASKED}),
    "rounded, stages of split heads there and back": ("llama-tied", {**HEADS, **BACK}, {**ROUNDED, **UNASKED}),
    "rounded, stages of split heads, beside an adapter": ("llama", HEADS, {**LORA, **ROUNDED, **UNASKED}),
    "rounded, stages of experts": ("qwen3-moe", EXPERTS, {**ROUNDED, **ONE_STEP}),
    "noise, two pipelines": ("llama-tied", {}, NOISE),
    "noise, a pipeline of slices": ("llama-tied", {"data_parallel_shard_degree": 2}, NOISE),
    "unfrozen in turn, two pipelines": ("qwen3", {}, IN_TURN),
    "unfrozen in turn, a pipeline of slices": ("qwen3", {"data_parallel_shard_degree": 2}, IN_TURN),
    "int4, two pipelines": ("llama", {}, {**LORA, "model": {"quantization": "int4"}}),
    "int4, a pipeline of slices": (
        "llama",
        {"data_parallel_shard_degree": 2},
        {**LORA, "model": {"quantization": "int4"}},
    ),
    "rounded, a pipeline of slices": ("llama", {"data_parallel_shard_degree": 2}, {**ROUNDED, **ONE_STEP}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_four_processes_find_them_in_pipelines_side_by_side(case, four, folders, uneven_file, tmp_path):
    if find_spec(LIBRARIES.get(case.partition(",")[0], "torch")) is None:
        pytest.skip("the library is not installed")
    family, parallelism, sections = PRODUCTS[case]
    settings, model = settings_of(sections, folders), folders(family, **WIDE)
    together = four.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_weights(alone, together)


WITH_WHOLE_LOSS = [{**WAYS_OF_FOUR[0], **WHOLE_LOSS}, *WAYS_OF_FOUR[1:]]
GOING_ON: dict[str, dict[str, Any]] = {
    "a teacher": {"distillation": TEACHER},
    "noise": NOISE,
    "unfrozen in turn": {"freezing": {"unfreeze_interval": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize(("crew", "ways"), [("two", WAYS_OF_TWO), ("four", WITH_WHOLE_LOSS)], ids=["two", "four"])
@pytest.mark.parametrize("case", GOING_ON)
def test_a_run_goes_on_in_stages_and_without(case, crew, ways, request, folders, uneven_file, tmp_path):
    settings = {**LONGER, **settings_of(GOING_ON[case], folders)} | LONGER
    some, model = request.getfixturevalue(crew), folders("llama-tied", **FOUR_LAYERS)
    same_weights(*broken_off(some, model, uneven_file, tmp_path, settings, ways))


@pytest.mark.slow
def test_only_the_process_with_the_last_stage_loads_the_teacher(two, folders, uneven_file, tmp_path):
    settings = settings_of({"distillation": TEACHER}, folders)
    for order, loads in ({}, [False, True]), (BACK, [True, False]):
        found = two.call(
            "tests.distributed.test_pipeline_further:loads_teacher",
            str(folders("llama", **FOUR_LAYERS)),
            str(uneven_file),
            str(tmp_path / "out"),
            {**settings, "parallelism": {**TWO, **order}},
        )
        assert found == loads


def loads_teacher(group: Any, model: str, rows: str, output: str, settings: dict[str, Any]) -> bool:
    """Whether this process has the teacher as a model."""
    import torch

    from tests.invariants.run import recipe
    from training_hub.backends import Given
    from training_hub.backends.torch_engine.layouts import layout_of
    from training_hub.backends.torch_engine.materials import load_materials
    from training_hub.backends.torch_engine.teacher.online import Online
    from training_hub.backends.torch_engine.teacher.teaching import open_teaching
    from training_hub.monitoring.console import open_console

    asked, console, cpu = (
        recipe(Path(model), Path(rows), Path(output), **settings),
        open_console("off"),
        torch.device("cpu"),
    )
    materials = load_materials(asked, Given(), console)
    layout = layout_of(asked.parallelism, group, cpu)
    found = open_teaching(asked, materials.teacher, materials.prepared.train, cpu, console, layout=layout)
    return isinstance(found, Online)
