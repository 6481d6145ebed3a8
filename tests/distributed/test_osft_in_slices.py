"""What OSFT trains is made of weights that no process has all of: each is read whole where it is decomposed, alone."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.distributed.test_osft_of_split_models import OSFT, same_protection
from tests.distributed.test_split_models import CLOSE
from tests.invariants.run import recipe, train
from training_hub.backends.torch_engine.planning.memory import GIB
from training_hub.backends.torch_engine.planning.plan import plan
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.errors import TrainingError
from training_hub.monitoring.console import open_console

SLICES = {"data_parallel_shard_degree": -1}
HEADS = {"tensor_parallel_degree": 2}
STAGES = {"pipeline_parallel_degree": 2}
EXPERTS = {"data_parallel_shard_degree": 2, "expert_parallel_degree": 2}
TOKENS = {"context_parallel_degree": 2}
LOW = {"model": {"dtype": "bfloat16"}}
BY_ENERGY = {"energy": 0.9, "cache": False}
TABLES = {**OSFT, "targets": ["q_proj", "embed_tokens"]}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "slices, finer than they are computed": ("llama-tied", SLICES, LOW),
    "stages": ("llama", STAGES, {}),
}
MORE_CASES: dict[str, Case] = {
    "slices": ("llama", SLICES, {}),
    "heads, finer than they are computed": ("llama", HEADS, LOW),
    "slices of a table that is also the head": ("llama-tied", SLICES, {"osft": TABLES}),
    "slices, one matrix between two bases": ("qwen3", SLICES, {"osft": {**OSFT, "form": "core"}}),
    "slices of fused weights, cut one by one": ("phi3", SLICES, {"osft": {**OSFT, "split_fused": True}}),
    "slices, ranks by energy": ("llama", SLICES, {"osft": BY_ENERGY}),
    "slices, others frozen": ("llama", SLICES, {"osft": {**OSFT, "others": "freeze"}}),
    "slices, layer by layer": ("llama", SLICES, {**LOW, "osft": {**OSFT, "gradients": "layer"}}),
    "slices of experts": ("mixtral", SLICES, {}),
    "experts": ("qwen3-moe", EXPERTS, LOW),
    "heads of experts": ("qwen3-moe", HEADS, {}),
    "stages, finer than they are computed": ("llama-tied", {**STAGES, "pipeline_parallel_schedule": "GPipe"}, LOW),
    "tokens": ("llama", TOKENS, LOW),
    "slices, what is decomposed is kept": ("llama", SLICES, {"osft": {"unfreeze_rank_ratio": 0.5, "cache": True}}),
}
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES]


def settings_of(parallelism: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    settings = {"algorithm": "osft", "osft": OSFT, "training": STEPS, "optimizer": SGD, "parallelism": parallelism}
    return {**settings, **sections}


@pytest.mark.parametrize("case", [*CASES, *SLOW])
def test_it_begins_as_beside_a_whole_model(case, two, folders, chat_file, tmp_path):
    """Bit for bit; and beside its slices each process reads what it decomposes, and no number twice."""
    family, parallelism, sections = {**CASES, **MORE_CASES}[case]
    model = folders(family, num_hidden_layers=4)
    asked = recipe(model, chat_file, tmp_path / "run", **settings_of(parallelism, sections))
    each = two.call("tests.distributed.beginning:begun", asked.model_dump(mode="json"))
    for one in each:
        assert one["is_blank"] and one["made"] > 10
        assert one["unlike"] == []
    if parallelism is SLICES:  # else what is kept in 16 bits also reads its pieces of what it came as
        assert sum(one["read"] for one in each) == each[0]["decomposed"]
        assert max(one["read"] for one in each) <= 0.8 * each[0]["decomposed"]


@pytest.mark.slow
def test_no_process_holds_the_model_or_all_that_trains(four, folders, chat_file, tmp_path):
    """Each keeps a quarter of the model and of what trains. Beside that it holds for a while a matrix and what is made
    of it, what others keep of its share, and a layer that is gathered; with all of it less than the model. Files that
    are mapped are not counted."""
    model = folders("llama", num_hidden_layers=16, hidden_size=128, intermediate_size=352)
    whole = sum(one.numel() * one.element_size() for one in load_file(model / "model.safetensors").values())
    asked = recipe(model, chat_file, tmp_path / "run", **settings_of(SLICES, {}))
    for one in four.call("tests.distributed.beginning:begun", asked.model_dump(mode="json")):
        assert one["unlike"] == []
        assert one["read"] == one["decomposed"] / 4
        assert one["own"] <= 0.27 * one["alone"]
        assert one["rise"] - (one["own"] - whole / 4) < whole


def test_the_plan_counts_no_whole_model_before_the_first_step(tiny_model_folder, chat_file, tmp_path):
    """Of a model of 300 MB, from its config."""
    model = copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 48, "hidden_size": 256, "intermediate_size": 2048, "layer_types": None}
    (model / "config.json").write_text(json.dumps(config))
    few = {**OSFT, "targets": ["layers.0.self_attn.q_proj"], "others": "freeze"}
    settings = settings_of(SLICES, {"osft": few, "training": {**STEPS, "activation_checkpointing": "full"}})
    asked = recipe(model, chat_file, tmp_path / "run", processes={"procs": 8}, **settings)
    planned = plan(asked, open_console("off"), measures=False)
    assert planned["memory_gib"]["total"] - planned["memory_gib"]["libraries"] < 4 * planned["parameters"] / GIB


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [SLICES, HEADS, STAGES, TOKENS], ids=json.dumps)
def test_importance_is_measured_once_the_model_is_divided(parallelism, two, folders, chat_file, tmp_path):
    """Sums in another order differ in their last digits; ranks, and so all bits of factors, are the same here."""
    rows = [{"text": f"the {word} is wide, and no lemon"} for word in ("river", "tiger", "paper")]
    watch = tmp_path / "general.jsonl"
    watch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"osft": {**OSFT, "importance": True, "least_kept": 0.2}, "evaluation": {"watch": str(watch)}}
    model = folders("llama", num_hidden_layers=4)
    asked = recipe(model, chat_file, tmp_path / "run", **settings_of(parallelism, sections))
    for one in two.call("tests.distributed.beginning:begun", asked.model_dump(mode="json")):
        assert one["is_blank"] and one["made"] > 10
        assert one["unlike"] == []


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [SLICES, STAGES], ids=json.dumps)
def test_what_an_earlier_task_protects_is_cut_from_slices_too(parallelism, two, folders, chat_file, tmp_path):
    sections = {"osft": {**OSFT, "carry": True}, "training": {**STEPS, "preflight": False}}
    model = folders("llama", num_hidden_layers=4)
    first = train(model, chat_file, tmp_path / "first", **settings_of({}, sections)).model_path
    asked = recipe(Path(first), chat_file, tmp_path / "second", **settings_of(parallelism, sections))
    for one in two.call("tests.distributed.beginning:begun", asked.model_dump(mode="json")):
        assert one["is_blank"] and one["made"] > 10
        assert one["unlike"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism",
    [
        {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
        {**HEADS, "data_parallel_shard_degree": 2},
        {**STAGES, "data_parallel_shard_degree": 2},
        {**STAGES, **HEADS},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_begins_so_in_products_of_layouts(parallelism, dtype, four, folders, chat_file, tmp_path):
    sections = {"model": {"dtype": dtype}}
    asked = recipe(
        folders("llama", num_hidden_layers=4), chat_file, tmp_path / "run", **settings_of(parallelism, sections)
    )
    for one in four.call("tests.distributed.beginning:begun", asked.model_dump(mode="json")):
        assert one["is_blank"] and one["made"] > 10
        assert one["unlike"] == []


LONGER = {"training": {"global_batch_size": 4, "epochs": 1, "preflight": False}, "checkpoint": {"interval": 1}}


@pytest.mark.slow
def test_what_lies_in_one_process_goes_on_in_any_number(two, four, folders, uneven_file, tmp_path):
    """Of each matrix one process writes what trains, and another may go on from it, with what the optimizer kept."""
    settings = {"algorithm": "osft", "osft": OSFT, "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}, **LONGER}
    model, output = folders("llama"), tmp_path / "run"
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)
    for crew, parallelism, step in ((four, SLICES, 2), (two, HEADS, 4), (two, SLICES, 6)):
        order = {"signalled": 0, "step": step}
        ended = crew.train(model, uneven_file, output, order, parallelism=parallelism, **settings)
        assert {each.get("error") for each in ended} == {"Interrupted"}, ended
        if parallelism is SLICES:
            _written_once(output / "checkpoints" / f"step-{step}", len(ended))
    resumed = four.train(model, uneven_file, output, parallelism={**HEADS, "data_parallel_shard_degree": 2}, **settings)
    same_protection(unbroken, resumed)
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE


def _written_once(folder: Path, num_processes: int) -> None:
    for name in ("model", "optimizer"):
        held = []
        for rank in range(num_processes):
            with opened([folder / f"{name}-rank{rank}.safetensors"]) as files:
                held.append({key for key in files.shapes if ".osft." in key})
        assert all(held) and len(set().union(*held)) == sum(map(len, held))


@pytest.mark.slow
def test_16_bits_of_one_process_go_on_in_slices(two, folders, uneven_file, tmp_path):
    """A checkpoint of one process holds what such weights came as; slices of float32 go on from what they have become.
    Sums of bfloat16 numbers in another order are off by a few in a thousand of what was learned."""
    settings = {"algorithm": "osft", "osft": OSFT, "optimizer": SGD, **LONGER}
    settings["model"] = {"dtype": "bfloat16", "save_dtype": "float32"}
    model, output = folders("llama"), tmp_path / "run"
    unbroken = train(model, uneven_file, tmp_path / "unbroken", **settings)

    def stop(report: Any) -> None:
        if report.step == 4:
            raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(model, uneven_file, output, (stop,), **settings)
    resumed = two.train(model, uneven_file, output, parallelism=SLICES, **settings)
    assert [each.get("status") for each in resumed] == ["finished"] * 2, resumed
    before, wanted, found = weights(model), weights(unbroken.model_path), weights(resumed[0]["model_path"])
    for name, weight in wanted.items():
        moved = torch.linalg.vector_norm(weight - before[name])
        assert torch.linalg.vector_norm(found[name] - weight) <= 0.05 * moved, name
