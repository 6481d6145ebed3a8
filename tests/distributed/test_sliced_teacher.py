"""A teacher in slices: asked beside a student in slices, it says what a whole one says, and no process has all of it.

Float32, plain SGD, as in test_equal_numbers.py, whose reasons for both hold here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from tests.backends.torch_engine.tiny_models import SHAPE, from_config
from tests.distributed.test_equal_numbers import SGD, STEPS, apart, same_steps, weights
from tests.distributed.test_pipeline_adapters import LONGER, broken_off
from tests.distributed.test_sharded import CLOSE, SHARDED, SMALL_PACKS
from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.layouts.fully_sharded import blocks_of
from training_hub.backends.torch_engine.layouts.pieces import local_of
from training_hub.backends.torch_engine.layouts.share import Share, Sizes
from training_hub.backends.torch_engine.loading.dividing import load_blank
from training_hub.backends.torch_engine.materials import load_materials
from training_hub.backends.torch_engine.parallel import ALONE
from training_hub.backends.torch_engine.teacher.kept import Kept
from training_hub.backends.torch_engine.teacher.load import teacher_load
from training_hub.backends.torch_engine.teacher.online import Online
from training_hub.backends.torch_engine.teacher.teaching import open_teaching
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.data.packing import pack
from training_hub.monitoring.console import open_console

CPU = torch.device("cpu")

EVERY_SAMPLE = {**STEPS, "global_batch_size": 1}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "uneven packs, accumulated": ("llama", "qwen3", {"training": SMALL_PACKS}),
    "one pack for two processes": ("qwen3", "llama-tied", {"training": EVERY_SAMPLE}),
    "one sample at a time": ("llama", "qwen3", {"data": {"packing": False}, "training": SMALL_PACKS}),
    "a prompt of its own": ("llama", "llama", {"distillation": {"prompt": "You know it."}}),
    "a head with a bias": ("llama", "phi", {"training": SMALL_PACKS}),
    "with proofs": ("llama", "qwen3", {"training": {**SMALL_PACKS, "preflight": True}}),
    "weights kept": (
        "llama",
        "qwen3-moe",
        {"training": SMALL_PACKS, "parallelism": {**SHARDED, "fsdp_reshard_after_forward": "never"}},
    ),
    "lora": ("llama", "qwen3", {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}),
}


def settings_of(sections: dict[str, Any], teacher: Any) -> dict[str, Any]:
    settings = {"training": STEPS, "optimizer": SGD, "evaluation": {"interval": 1}, "parallelism": SHARDED, **sections}
    settings["data"] = {"validation_fraction": 0.2, **settings.get("data", {})}
    return {**settings, "distillation": {"teacher": str(teacher), "alpha": 0.5, **settings.get("distillation", {})}}


FAST = "uneven packs, accumulated"


@pytest.mark.parametrize("case", [FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in CASES if one != FAST)])
def test_two_processes_with_half_a_teacher_each_find_the_numbers_of_one(case, two, folders, uneven_file, tmp_path):
    student, teacher, sections = CASES[case]
    model, settings = folders(student), settings_of(sections, folders(teacher, hidden_size=48))
    together = two.train(model, uneven_file, tmp_path / "together", **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    name = "adapter_model" if case == "lora" else "model"
    assert apart(weights(alone.model_path, name), weights(together[0]["model_path"], name)) <= CLOSE


@pytest.mark.slow
def test_processes_with_other_numbers_of_samples_ask_one_that_cannot_pack_equally_often(
    two, folders, uneven_file, tmp_path
):
    teacher = tmp_path / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folders("llama"))
    config = transformers.MambaConfig(**{**SHAPE, "vocab_size": len(tokenizer), "state_size": 8})
    from_config(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    settings = settings_of({"training": SMALL_PACKS}, teacher)
    together = two.train(folders("llama"), uneven_file, tmp_path / "together", **settings)
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


def rewritten(folder: Path, place: Path, change: Any) -> Path:
    """A copy of a model's folder whose weights, by name, are what `change` makes of them."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return place


@pytest.mark.slow
def test_one_whose_files_name_weights_otherwise_lies_in_slices_too(two, folders, uneven_file, tmp_path):
    def renamed(held: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("model."): weight for name, weight in held.items()}

    teacher = rewritten(folders("llama-tied"), tmp_path / "teacher", renamed)
    assert not isinstance(load_blank(recipe(teacher, uneven_file, tmp_path / "none"), CPU, torch.float32), str)
    settings = settings_of({"training": SMALL_PACKS}, teacher)
    together = two.train(folders("llama"), uneven_file, tmp_path / "together", **settings)
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, -1])
def test_numbers_that_are_not_finite_in_one_process_end_all(row, two, folders, uneven_file, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"

    def broken(held: dict[str, Any]) -> dict[str, Any]:
        held[name][row] = torch.nan
        return held

    teacher = rewritten(folders("llama"), tmp_path / "teacher", broken)
    ended = two.train(folders("llama"), uneven_file, tmp_path / "together", **settings_of({}, teacher))
    assert [each["error"] for each in ended] == ["TrainingError"] * 2, ended
    said = ["\n".join(each["problems"]) for each in ended]
    assert name in said[row] and all(f"The teacher {teacher} came with them" in one for one in said)


KEPT: dict[str, dict[str, Any]] = {
    "likeliest tokens": {"distillation": {"cache": "top_k", "top_k": 8}},
    "tokens drawn": {"distillation": {"cache": "sampled", "samples": 8}},
    "likeliest tokens, kept for the run alone": {"distillation": {"cache": "top_k", "top_k": 8}},
    "behind a prompt": {"distillation": {"cache": "top_k", "top_k": 8, "prompt": "You know it."}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KEPT)
def test_what_a_sliced_teacher_says_before_training_is_what_a_whole_one_says(case, two, folders, uneven_file, tmp_path):
    settings = settings_of({"training": SMALL_PACKS, **KEPT[case]}, folders("qwen3", hidden_size=48))
    is_kept = "alone" not in case

    def of(cache: str, **sections: Any) -> dict[str, Any]:
        where = {"cache": True, "cache_dir": str(tmp_path / cache)} if is_kept else {}
        return {**settings, "data": {**settings["data"], **where}, **sections}

    together = two.train(folders("llama"), uneven_file, tmp_path / "together", **of("theirs"))
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **of("own", parallelism={}))
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "theirs").rglob("part-*/ids.bin")}
    assert bool(parts) == is_kept
    again = two.train(folders("llama"), uneven_file, tmp_path / "again", **of("theirs"))
    same_steps(alone, again)
    assert parts == {path: path.stat().st_mtime_ns for path in (tmp_path / "theirs").rglob("part-*/ids.bin")}


@pytest.mark.slow
def test_processes_that_see_no_common_folder_keep_what_a_sliced_teacher_says_each_in_its_own(
    two, folders, uneven_file, tmp_path
):
    settings = settings_of(KEPT["tokens drawn"], folders("qwen3", hidden_size=48))
    given = (str(folders("llama")), str(uneven_file))
    called = (*given, str(tmp_path / "together"), settings)
    first, second = two.call("tests.distributed.test_sliced_teacher:kept_apart", *called)
    assert first == second == kept_apart(ALONE, *given, str(tmp_path / "alone"), {**settings, "parallelism": {}})
    assert len(list(tmp_path.glob("together-*/*/*/part-*/ids.bin"))) == 2


def kept_apart(group: Any, model: str, rows: str, output: str, settings: dict[str, Any]) -> list[int]:
    """The tokens that a teacher was heard to say, in a process with a cache of its own."""
    where = {"cache": True, "cache_dir": f"{output}-{group.rank}"}
    asked = recipe(Path(model), Path(rows), Path(output), **{**settings, "data": {**settings["data"], **where}})
    console = open_console("off")
    materials = load_materials(asked, Given(), console)
    store, layout = materials.prepared.train, layout_of(asked.parallelism, group, CPU)
    kept = open_teaching(asked, materials.teacher, store, CPU, console, layout=layout)
    assert isinstance(kept, Kept)
    return kept.store.rows(range(len(store))).ids.ravel().tolist()


STAGES = {"data_parallel_shard_degree": 2, "pipeline_parallel_degree": 2}
FOUR: dict[str, dict[str, Any]] = {
    "slices of stages": STAGES,
    "slices of stages, asked before": STAGES,
    "two replicas of two slices": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
    "slices of split tokens": {"data_parallel_shard_degree": 2, "context_parallel_degree": 2},
    "slices of split heads": {
        "data_parallel_shard_degree": 2,
        "tensor_parallel_degree": 2,
        "disable_loss_parallel": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_find_them_too(case, four, folders, uneven_file, tmp_path):
    asked = {"distillation": {"cache": "top_k", "top_k": 8}} if "before" in case else {}
    sections = {"training": SMALL_PACKS, "parallelism": FOUR[case], **asked}
    settings = settings_of(sections, folders("qwen3", hidden_size=48))
    together = four.train(folders("llama"), uneven_file, tmp_path / "together", **settings)
    alone = train(folders("llama"), uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    assert apart(weights(alone.model_path), weights(together[0]["model_path"])) <= CLOSE


@pytest.mark.slow
def test_a_run_goes_on_beside_a_sliced_teacher_and_a_whole_one(two, folders, uneven_file, tmp_path):
    settings = settings_of(LONGER, folders("qwen3", hidden_size=48))
    del settings["parallelism"]
    unbroken, resumed = broken_off(two, folders("llama"), uneven_file, tmp_path, settings, [SHARDED, {}, SHARDED])
    assert apart(weights(unbroken.model_path), weights(resumed[0]["model_path"])) <= CLOSE


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3-moe", marks=pytest.mark.slow)])
def test_no_process_has_more_than_its_slices_and_what_is_asked_just_then(family, two, folders, uneven_file, tmp_path):
    teacher = folders(family, hidden_size=48, num_hidden_layers=6)
    settings = settings_of({}, teacher)
    found = two.call(HELD, *map(str, (folders("llama"), uneven_file, tmp_path / "out")), settings)
    for each in found:
        assert each["own"] <= each["planned"] == pytest.approx(each["all"] / 2, rel=0.05)
        assert each["whole at rest"] == 0
        assert each["most whole"] == each["around and a block"]
    assert sum(each["own"] for each in found) == found[0]["all"]


HELD = "tests.distributed.test_sliced_teacher:held"


def held(group: Any, model: str, rows: str, output: str, settings: dict[str, Any]) -> dict[str, float]:
    """Bytes of a sliced teacher in this process: of its slices, as planned, and of what is whole while it is asked."""
    asked, console = recipe(Path(model), Path(rows), Path(output), **settings), open_console("off")
    materials = load_materials(asked, Given(), console)
    store, layout = materials.prepared.train, layout_of(asked.parallelism, group, CPU)
    online = open_teaching(asked, materials.teacher, store, CPU, console, layout=layout)
    assert isinstance(online, Online)
    teacher, most = online.model, [0]

    def whole() -> int:
        return sum(_bytes(one) for one in teacher.parameters() if not isinstance(one, DTensor))

    def look(module: Any, given: Any) -> None:
        most.append(whole())

    for block in blocks_of(teacher):
        next(block.children()).register_forward_pre_hook(look)
    one = pack([store[0], store[1]], [0, 1])
    online.targets(to_device(one, CPU))
    load = teacher_load(asked, materials.teacher, one, CPU, Share(slices=2))
    sizes, beside = Sizes.of(teacher), teacher_load(asked, materials.teacher, one, CPU).beside
    return {
        "own": sum(_bytes(local_of(one)) for one in teacher.parameters()),
        "all": sum(_bytes(one) for one in teacher.parameters()),
        "planned": load.beside - beside + sizes.total * 4 - _bytes(teacher.get_output_embeddings().weight),
        "whole at rest": whole(),
        "most whole": max(most),
        "around and a block": (sizes.around + sizes.block) * 4,
    }


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
