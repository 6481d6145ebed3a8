"""The final model of a divided one: written by all processes in files of a stated size, and read by transformers."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.distributed.crew import Crew
from tests.distributed.lacking import lacks_order
from tests.distributed.test_equal_numbers import SGD, STEPS, apart
from tests.invariants.run import recipe, train
from tests.invariants.test_as_they_came import written_as
from tests.invariants.test_families import folder_of
from tests.workers import workers
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.errors import LaunchError
from training_hub.folders import damage
from training_hub.launch import run

LAYOUTS = {
    "slices": {"data_parallel_shard_degree": -1},
    "split": {"tensor_parallel_degree": 2},
    "stages": {"pipeline_parallel_degree": 2},
    "stages there and back": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
    "slices of stages": {"pipeline_parallel_degree": 2, "data_parallel_shard_degree": 2},
    "slices of heads": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2},
}
CASES = [
    ("llama", "slices"),
    ("llama", "split"),
    ("llama-tied", "slices"),
    ("mixtral", "slices"),
    ("qwen3-moe", "slices"),
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_files_of_all_processes_are_the_model_that_one_writes(
    family, layout, two, tiny_model_folder, uneven_file, tmp_path
):
    model = copytree(folder_of(family, tiny_model_folder, tmp_path / "model"), tmp_path / "base")
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20).save_pretrained(model)
    settings = {
        "model": {"save_dtype": "bfloat16"},
        "training": {**STEPS, "steps": 2},
        "optimizer": SGD,
        "checkpoint": {"max_shard_size": "20KB"},
    }
    ended = two.train(model, uneven_file, tmp_path / "together", **settings, parallelism=LAYOUTS[layout])
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    final, wanted = Path(ended[0]["model_path"]), alone.model_path
    assert not damage(final)
    assert {path.name for path in final.iterdir() if not path.name.startswith("model-")} == {
        path.name for path in wanted.iterdir() if not path.name.startswith("model-")
    }
    assert len(list(final.glob("model-*-of-*.safetensors"))) > 2
    ours, theirs = (json.loads((one / "model.safetensors.index.json").read_text()) for one in (final, wanted))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"] == theirs["metadata"]
    loaded, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = AutoModelForCausalLM.from_pretrained(wanted)
    assert loaded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, so that sums in another order may round to the next number.
    assert apart(loaded.state_dict(), other.state_dict()) <= 2**-8
    for name in ("config.json", "generation_config.json"):
        assert json.loads((final / name).read_text()) == json.loads((wanted / name).read_text())
    assert json.loads((final / "generation_config.json").read_text())["temperature"] == 0.6


def test_what_nothing_has_moved_is_written_as_it_came(two, tiny_model_folder, uneven_file, tmp_path):
    """Computed in bfloat16, which holds few of the tiny model's float32 numbers; such a rate moves none of them."""
    settings = {
        "model": {"dtype": "bfloat16"},
        "training": {**STEPS, "steps": 2},
        "optimizer": {"lr": 1e-30},
        "freezing": {"blocks": 1},
        "checkpoint": {"max_shard_size": "40KB"},
        "parallelism": LAYOUTS["slices"],
    }
    ended = two.train(tiny_model_folder, uneven_file, tmp_path / "together", **settings)
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    final, base = (AutoModelForCausalLM.from_pretrained(one) for one in (ended[0]["model_path"], tiny_model_folder))
    assert apart(final.state_dict(), base.state_dict()) == 0


OSFT = {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False, "carry": True}}
LOW = {"model": {"dtype": "bfloat16", "save_dtype": "float32"}}
FOUR_LAYERS = {"num_hidden_layers": 4}

WRITTEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stages, of which each has parts of one file": ("llama-tied", "stages", {}),
    "factors of weights that are split, in 16 bits": ("llama", "split", {**OSFT, **LOW}),
    "weights of factors, in slices": ("qwen3", "slices", OSFT),
    "factors of stages": ("llama", "stages", OSFT),
}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stages in 16 bits, with masters": ("qwen3", "stages there and back", LOW),
    "stages of experts": ("qwen3-moe", "stages", {}),
    "stages with half of each master beside the weight": (
        "llama",
        "stages",
        {**LOW, "optimizer": {"name": "AdamW", "state": "split"}},
    ),
    "factors of experts": ("mixtral", "slices", OSFT),
}
BY_FOUR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "slices of stages": ("llama-tied", "slices of stages", {}),
    "factors of slices of heads": ("qwen3", "slices of heads", OSFT),
}


def same_final(crew: Crew, model: Path, rows: Path, output: Path, layout: str, settings: dict[str, Any]) -> Path:
    """Each file of weights of all processes has the bytes of that which one process writes that goes on from the last
    checkpoint of theirs, where nothing is left to learn."""
    settings = {
        "training": {**STEPS, "steps": 2, "max_tokens_per_gpu": 256},
        "optimizer": SGD,
        "checkpoint": {"interval": 2, "max_shard_size": "45KB"},
        **settings,
    }
    ended = crew.train(model, rows, output, parallelism=LAYOUTS[layout], **settings)
    if lacks_order(ended, LAYOUTS[layout]):
        pytest.skip("this torch refuses the order of the stages")
    assert {each.get("status") for each in ended} == {"finished"}, ended
    final = (output / "final").rename(output / "together")
    (output / "result.json").unlink()
    alone = train(model, rows, output, **settings)
    assert not damage(final)
    names = {path.name for path in alone.model_path.iterdir()}
    assert {path.name for path in final.iterdir()} == names
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) > 2
    about = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert [n for n in (*weights, *about) if (final / n).read_bytes() != (alone.model_path / n).read_bytes()] == []
    return final


@pytest.mark.parametrize("case", WRITTEN)
def test_all_processes_write_the_bytes_that_one_writes(case, two, folders, uneven_file, tmp_path):
    family, layout, settings = WRITTEN[case]
    same_final(two, folders(family, **FOUR_LAYERS), uneven_file, tmp_path / "run", layout, settings)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_so_they_do_of_other_models(case, two, folders, uneven_file, tmp_path):
    family, layout, settings = MORE[case]
    same_final(two, folders(family, **FOUR_LAYERS), uneven_file, tmp_path / "run", layout, settings)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stages", "slices"])
def test_files_are_parted_by_the_formats_that_weights_keep(layout, two, folders, uneven_file, tmp_path):
    def formats(name: str) -> torch.dtype:
        return torch.float32 if "norm" in name or ".1." in name else torch.bfloat16

    model = written_as(folders("llama", **FOUR_LAYERS), tmp_path / "model", formats)
    settings = {"model": {"dtype": "bfloat16"}, "freezing": {"blocks": 2}}
    final = same_final(two, model, uneven_file, tmp_path / "run", layout, settings)
    kept = {name: one.dtype for file in final.glob("model-*.safetensors") for name, one in load_file(file).items()}
    # What is frozen stays as it came; the rest has the format of most.
    assert {name for name, kind in kept.items() if kind == torch.float32} == {
        name
        for name in kept
        if formats(name) == torch.float32 and name.startswith(("model.layers.0.", "model.layers.1."))
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_FOUR)
def test_so_do_four_by_two_ways_at_once(case, four, folders, uneven_file, tmp_path):
    family, layout, settings = BY_FOUR[case]
    same_final(four, folders(family, **FOUR_LAYERS), uneven_file, tmp_path / "run", layout, settings)


@pytest.mark.parametrize(("layout", "settings"), [("stages", {}), ("split", {**OSFT, **LOW}), ("slices", OSFT)])
def test_no_process_holds_more_than_a_weight_to_write_it(layout, settings, two, folders, uneven_file, tmp_path):
    """Though all are in one file: what is gathered of a weight, and its copy in the format that is written."""
    model = folders("llama", **FOUR_LAYERS)
    asked = recipe(model, uneven_file, tmp_path / "run", parallelism=LAYOUTS[layout], training=STEPS, **settings)
    made = two.call("tests.distributed.measuring:written", asked.model_dump(mode="json"), str(tmp_path / "made"))
    file = tmp_path / "made" / "model.safetensors"
    with opened([file]) as tensors:
        largest = max(4 * math.prod(shape) for shape in tensors.shapes.values())
    assert file.stat().st_size > 4 * largest
    assert made[0]["files"] and not made[1]["files"]
    assert largest <= made[0]["most_held"] <= 2 * largest and made[1]["most_held"] == 0


def test_no_process_holds_what_stages_carry_on_to_write_it(two, folders, uneven_file, tmp_path):
    """Of what others have, process 0 holds one tensor at a time, and a hash of it."""
    model = folders("llama", **FOUR_LAYERS)
    asked = recipe(model, uneven_file, tmp_path / "run", parallelism=LAYOUTS["stages"], training=STEPS, **OSFT)
    (tmp_path / "made").mkdir()
    made = two.call("tests.distributed.measuring:carried", asked.model_dump(mode="json"), str(tmp_path / "made"))
    assert all(each["own"] > 20 * each["largest"] for each in made)
    assert made[1]["largest"] <= made[0]["rise"] <= 2 * made[1]["largest"]
    assert made[1]["rise"] <= 2 * made[1]["largest"]
    with opened([tmp_path / "made" / "osft_state.safetensors"]) as tensors:
        held = sum(4 * math.prod(shape) for shape in tensors.shapes.values())
    assert held == sum(each["own"] for each in made)


def test_a_full_disk_of_one_process_leaves_the_model_that_was_there(two, folders, uneven_file, tmp_path):
    settings = {
        "training": {**STEPS, "steps": 2},
        "checkpoint": {"interval": 2},
        "parallelism": LAYOUTS["stages"],
    }
    model, output = folders("llama", **FOUR_LAYERS), tmp_path / "run"

    def write(order: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
        asked = {**settings, "checkpoint": {**settings["checkpoint"], **changes}}
        return two.train(model, uneven_file, output, order, **asked)

    ended = write()
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    (output / "result.json").unlink()
    before = (output / "final" / "manifest.json").read_bytes()
    # Its part of a file, but not of what is sent to process 0, is too large for it.
    ended = write({"limited": 1}, max_shard_size="60KB")
    assert [each.get("error") for each in ended] == ["DiskError"] * 2, ended
    assert "rank 1: " in " ".join(ended[0]["problems"])
    assert (output / "final" / "manifest.json").read_bytes() == before and not damage(output / "final")
    assert not list(output.glob(".tmp-*"))
    ended = write(max_shard_size="60KB")
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    assert not damage(output / "final") and len(list((output / "final").glob("model-*.safetensors"))) > 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_while_all_write_leaves_no_half_model(rank, folders, uneven_file, tmp_path):
    """Whether it is killed before the model has its name or after, what has that name is whole."""
    output = tmp_path / "run"
    asked = recipe(
        folders("llama", **FOUR_LAYERS), uneven_file, output, processes={"procs": 2}, training={**STEPS, "steps": 2},
        checkpoint={"interval": 2, "max_shard_size": "20KB"}, parallelism=LAYOUTS["stages"],
    )  # fmt: skip

    def kill() -> None:
        while not (output / ".tmp-final").exists() and not (output / "final").exists():
            time.sleep(0.0005)
        with suppress(ProcessLookupError, IndexError):
            os.kill(workers()[rank], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with suppress(LaunchError):
        run(asked)
    assert not (output / "final").exists() or not damage(output / "final")
    assert run(asked).status in ("finished", "already finished")
    assert not damage(output / "final") and not list(output.glob(".tmp-*"))
