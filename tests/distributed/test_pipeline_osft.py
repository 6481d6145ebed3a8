"""OSFT beside a model in stages learns and protects what it does in one process: each process has its own matrices.

Float32 and plain SGD at a small rate, for the reasons that test_pipeline.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_equal_numbers import STEPS, apart, weights
from tests.distributed.test_osft_of_split_models import OSFT, same_protection
from tests.distributed.test_pipeline import CLOSE, SGD, SMALL_PACKS, TWO
from tests.distributed.test_pipeline_adapters import (
    BACK,
    EXPERTS,
    FOUR_LAYERS,
    HEADS,
    INTERLEAVED,
    LONGER,
    TOKENS,
    WAYS_OF_FOUR,
    Case,
    broken_off,
)
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import train
from training_hub.backends.torch_engine.saving.tensor_files import opened

CASES: dict[str, Case] = {
    "one forward, one backward": ("llama-tied", {}, {}),
}

MORE_CASES: dict[str, Case] = {
    "stages there and back, gradients of weights made later": ("llama", BACK, {}),
    "two stages in each process, gradients made later": (
        "qwen3",
        {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
        {},
    ),
    "layer by layer": ("qwen3", {}, {"osft": {**OSFT, "gradients": "layer"}}),
    "layer by layer, gradients made later": ("qwen3", BACK, {"osft": {**OSFT, "gradients": "layer"}}),
    "one matrix between two bases": ("qwen3", {}, {"osft": {**OSFT, "form": "core"}}),
    "fewer packs than stages": ("llama", {}, {"training": STEPS}),
    "one document after another": ("llama", {}, {"data": {"packing": False}}),
    "others frozen": ("llama-tied", {}, {"osft": {**OSFT, "others": "freeze"}}),
    "matrices of the first stage alone": ("llama", {}, {"osft": {**OSFT, "targets": ["layers.0.", "layers.1.mlp"]}}),
    "fused weights, cut one by one": ("phi3", {}, {"osft": {**OSFT, "split_fused": True}}),
    "a mixture of experts": ("qwen3-moe", {"pipeline_parallel_schedule": "Interleaved1F1B"}, {}),
    "ranks by energy": ("llama", {}, {"osft": {"energy": 0.9, "cache": False}}),
    "with proofs": ("llama", {}, {"training": {**SMALL_PACKS, "preflight": True}}),
}

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES]


def settings_of(sections: dict[str, Any]) -> dict[str, Any]:
    settings = {"algorithm": "osft", "osft": OSFT, "training": SMALL_PACKS, "optimizer": SGD, **sections}
    return {**settings, "data": {"validation_fraction": 0.2, **settings.get("data", {})}}


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_two_processes_learn_and_protect_in_stages_what_one_does(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    settings, model = settings_of(sections), folders(family, **FOUR_LAYERS)
    together = two.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_protection(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


LAYER_BY_LAYER = {"osft": {**OSFT, "gradients": "layer"}}

PRODUCTS: dict[str, Case] = {
    "two pipelines of two": ("qwen3", {}, {}),
    "two pipelines there and back": ("llama-tied", BACK, {}),
    "a pipeline of four": ("llama-tied", {"pipeline_parallel_degree": 4}, {}),
    "a pipeline of slices of weights": ("llama", {"data_parallel_shard_degree": 2}, {}),
    "stages of split heads": ("qwen3", HEADS, {}),
    "stages of split heads, gradients made later": ("llama", {**HEADS, **BACK}, {}),
    "stages of split heads, two in each process": ("llama-tied", {**HEADS, **INTERLEAVED}, {}),
    "stages of split heads, all tokens in each": ("qwen3", {**HEADS, "sequence_parallel": False}, {}),
    "stages of split heads, layer by layer": ("qwen3", HEADS, LAYER_BY_LAYER),
    "stages of split heads, layer by layer, gradients made later": ("llama", {**HEADS, **BACK}, LAYER_BY_LAYER),
    "stages of split heads, one matrix between two bases": ("llama", HEADS, {"osft": {**OSFT, "form": "core"}}),
    "stages of split heads, others frozen": ("llama-tied", HEADS, {"osft": {**OSFT, "others": "freeze"}}),
    "stages of split heads, ranks by energy": ("llama", HEADS, {"osft": {"energy": 0.9, "cache": False}}),
    "stages of split heads, fused weights": ("phi3", HEADS, {"osft": {**OSFT, "split_fused": True}}),
    "stages of split heads, with proofs": ("llama", HEADS, {"training": {**SMALL_PACKS, "preflight": True}}),
    "stages of split tokens": ("llama-tied", TOKENS, {}),
    "stages of split tokens there and back": ("qwen3", {**TOKENS, **BACK}, {}),
    "stages of split tokens, layer by layer": ("llama", TOKENS, LAYER_BY_LAYER),
    "stages of experts": ("qwen3-moe", EXPERTS, {}),
    "stages of experts, layer by layer": ("qwen3-moe", EXPERTS, LAYER_BY_LAYER),
    "stages of experts among heads": ("qwen3-moe", {**HEADS, "expert_parallel_degree": 2}, {}),
    "stages of experts among tokens": ("mixtral", {**TOKENS, "expert_parallel_degree": 2}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_four_processes_do_in_pipelines_side_by_side(case, four, folders, uneven_file, tmp_path):
    family, parallelism, sections = PRODUCTS[case]
    settings, model = settings_of(sections), folders(family, **FOUR_LAYERS)
    together = four.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **parallelism}, **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    same_steps(alone, together)
    same_protection(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["step", "layer"])
def test_what_is_protected_goes_on_in_stages_of_four_processes_too(gradients, four, folders, uneven_file, tmp_path):
    settings = {"algorithm": "osft", "osft": {**OSFT, "gradients": gradients}, **LONGER}
    model = folders("llama", **FOUR_LAYERS)
    unbroken, resumed = broken_off(four, model, uneven_file, tmp_path, settings, WAYS_OF_FOUR)
    same_protection(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_protected_goes_on_in_stages_and_without(dtype, two, folders, uneven_file, tmp_path):
    """Sums of bfloat16 numbers in another order are off by a few in a thousand of what was learned."""
    settings = {"algorithm": "osft", "osft": OSFT, "model": {"dtype": dtype, "save_dtype": "float32"}, **LONGER}
    model = folders("llama", **FOUR_LAYERS)
    if dtype == "float32":
        unbroken, resumed = broken_off(two, model, uneven_file, tmp_path, settings)
        same_protection(unbroken, resumed)
        assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE
        return
    unbroken, output = train(model, uneven_file, tmp_path / "unbroken", **settings), tmp_path / "run"
    order = {"signalled": 1, "step": 2}
    ended = two.train(model, uneven_file, output, order, parallelism=TWO, **settings)
    assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended
    resumed = two.train(model, uneven_file, output, parallelism={**TWO, **BACK}, **settings)
    before, wanted, found = weights(model), weights(unbroken.model_path), weights(resumed[0]["model_path"])
    for name, weight in wanted.items():
        moved = torch.linalg.vector_norm(weight - before[name])
        assert torch.linalg.vector_norm(found[name] - weight) <= 0.05 * moved, name


@pytest.mark.slow
def test_each_process_keeps_what_belongs_to_its_stages(two, folders, uneven_file, tmp_path):
    settings = settings_of({"checkpoint": {"interval": 2}, "optimizer": {"lr": 1e-3}})
    model, output = folders("llama", **FOUR_LAYERS), tmp_path / "run"
    ended = two.train(model, uneven_file, output, parallelism=TWO, **settings)
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    for rank, layers in ((0, "01"), (1, "23")):
        for name in ("model", "optimizer"):
            with opened([output / "checkpoints" / "step-2" / f"{name}-rank{rank}.safetensors"]) as files:
                held = {key.split(".")[2] for key in files.shapes if ".osft." in key}
            assert held == {*layers}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crew", "way"), [("two", {}), ("four", HEADS), ("four", TOKENS)], ids=["layers", "heads", "tokens"]
)
def test_what_stages_protect_is_protected_in_the_next_task(crew, way, request, folders, uneven_file, tmp_path):
    """What is left free is cut anew from a file of float32 numbers, whose last digit decides little."""
    settings = settings_of({"osft": {**OSFT, "carry": True}})
    model, some = folders("llama", **FOUR_LAYERS), request.getfixturevalue(crew)
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    together = some.train(model, uneven_file, tmp_path / "together", parallelism={**TWO, **way}, **settings)
    first, second = (Path(one) / "osft_state.safetensors" for one in (alone.model_path, together[0]["model_path"]))
    wanted, found = load_file(first), load_file(second)
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in wanted.items()}
    next_alone = train(Path(together[0]["model_path"]), uneven_file, tmp_path / "next alone", **settings)
    next_task = some.train(
        Path(together[0]["model_path"]), uneven_file, tmp_path / "next", parallelism={**TWO, **BACK, **way}, **settings
    )
    same_steps(next_alone, next_task)
    same_protection(next_alone, next_task)
