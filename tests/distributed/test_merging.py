"""The merged model of a divided run: all processes write it, with the bytes that one process writes, and none holds it.

What is merged is the adapter that the run has written, so that `merge` of the same adapter says what its bytes must be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.backends.torch_engine.lora.test_quantization import wide_model_folder as wide_model_folder
from tests.backends.torch_engine.lora.test_runs import train
from tests.distributed.crew import Crew
from tests.distributed.lacking import lacks_slices
from tests.distributed.test_equal_numbers import STEPS
from tests.invariants.run import recipe
from tests.invariants.test_as_they_came import written_as
from training_hub import merge_adapter
from training_hub.folders import damage

pytest.importorskip("peft")

LORA = {"r": 4, "dropout": 0.0}
FOUR_LAYERS = {"num_hidden_layers": 4}
SLICES = {"data_parallel_shard_degree": -1}
HEADS = {"tensor_parallel_degree": 2}
STAGES = {"pipeline_parallel_degree": 2}
EXPERTS = {"data_parallel_shard_degree": 2, "expert_parallel_degree": 2}
SIZE = {"max_shard_size": "20KB"}

Case = tuple[str, dict[str, Any], dict[str, Any]]

CASES: dict[str, Case] = {
    "slices, in 16 bits": ("llama-tied", SLICES, {"model": {"save_dtype": "bfloat16"}}),
}
MORE: dict[str, Case] = {
    "stages, and a copy of the table that trains": ("qwen3", STAGES, {"lora": {"modules_to_save": ["embed_tokens"]}}),
    "split heads": ("llama", HEADS, {}),
    "experts, dealt out": ("qwen3-moe", EXPERTS, {"lora": {"target_modules": ["q_proj"]}}),
    "experts with adapters, as others have them in files": ("mixtral", SLICES, {}),
    "tables": ("llama", SLICES, {"lora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}}),
    "rows of a table": ("llama", SLICES, {"lora": {"trainable_tokens": [5, 7]}}),
    "rows of a table that is also the head": ("llama-tied", STAGES, {"lora": {"trainable_tokens": [5, 7]}}),
    **{f"an adapter of {one}": ("llama", SLICES, {"lora": {"tuner": one}}) for one in ("dora", "pissa", "adalora")},
    "an adapter of norms": ("llama", SLICES, {"lora": {"tuner": "ln_tuning"}}),
}


def settings_of(parallelism: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    own = sections.get("lora", {})
    return {
        "algorithm": "lora_sft",
        "training": {**STEPS, "steps": 4},
        "optimizer": {"lr": 0.03},
        "checkpoint": SIZE,
        "parallelism": parallelism,
        **sections,
        "lora": {**(LORA if own.get("tuner") != "ln_tuning" else {}), **own, "merge": True},
    }


def same_merged(crew: Crew, model: Path, rows: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The merged model of all processes has the bytes of the one that one process makes; what merge.json says."""
    ended = crew.train(model, rows, folder / "run", **settings)
    if lacks_slices(ended, crew, settings["parallelism"], settings):
        pytest.skip("this torch cannot cut quantised weights")
    assert {each.get("status") for each in ended} == {"finished"}, ended
    merged, wanted = folder / "run" / "merged", folder / "alone"
    asked = {f"model.{name}": value for name, value in settings.get("model", {}).items() if name == "save_dtype"}
    size = {"checkpoint.max_shard_size": SIZE["max_shard_size"]}
    merge_adapter(Path(ended[0]["model_path"]), wanted, overrides={**size, **asked})
    assert not damage(merged)
    names = {path.name for path in wanted.iterdir()}
    assert {path.name for path in merged.iterdir()} == names
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    apart = [name for name in names if (merged / name).read_bytes() != (wanted / name).read_bytes()]
    assert set(apart) <= {"manifest.json", "merge.json"}
    said: dict[str, Any] = json.loads((merged / "merge.json").read_text())
    return said["deviation"]


@pytest.mark.parametrize("case", CASES)
def test_all_processes_write_the_bytes_that_one_merges(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = CASES[case]
    settings = settings_of(parallelism, sections)
    found = same_merged(two, folders(family, **FOUR_LAYERS), uneven_file, tmp_path, settings)
    # A float32 sum, rounded to 8 bits.
    assert found["layers"] == 28
    assert 1e-5 < found["relative"] < 2**-8


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_so_they_do_of_other_adapters(case, two, folders, uneven_file, tmp_path):
    family, parallelism, sections = MORE[case]
    found = same_merged(two, folders(family), uneven_file, tmp_path, settings_of(parallelism, sections))
    if "also the head" not in case:  # one process merges that, and compares logits
        assert "norms" in case or found["layers"] > 0
        assert found["relative"] < 1e-5, "a sum in float32, not rounded"


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "dora"])
def test_weights_that_files_hold_turned_are_made_dense_and_turned_back(tuner, two, folders, uneven_file, tmp_path):
    """Those of GPT-2. That it is the model that was trained, its logits say where one process has merged."""
    pytest.importorskip("bitsandbytes")
    lora = {"tuner": tuner, "r": 4, "target_modules": ["c_attn", "mlp.c_proj"]}
    settings = settings_of(SLICES, {"model": {"quantization": "int4"}, "lora": lora})
    found = same_merged(two, folders("gpt2"), uneven_file, tmp_path, settings)
    assert found["layers"] == 4 and found["relative"] < 1e-5, "a sum in float32, not rounded"
    said = json.loads((tmp_path / "alone" / "merge.json").read_text())
    assert said["deviation"]["relative"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_quantised_weights_are_made_dense_one_by_one(kind, two, wide_model_folder, uneven_file, tmp_path):
    pytest.importorskip({"int4": "bitsandbytes", "int8": "torchao"}[kind])
    settings = settings_of(SLICES, {"model": {"quantization": kind}, "lora": {"target_modules": ["q_proj"]}})
    found = same_merged(two, wide_model_folder, uneven_file, tmp_path, settings)
    assert found["layers"] == 2
    base = load_file(wide_model_folder / "model.safetensors")
    weights: dict[str, Any] = {}
    for file in (tmp_path / "run" / "merged").glob("*.safetensors"):
        weights |= load_file(file)
    moved = {name for name, one in weights.items() if not base[name].equal(one)}
    assert moved == {name for name in base if name.endswith("_proj.weight")}, "all of these were quantised"


@pytest.mark.slow
def test_weights_beside_the_adapter_stay_as_they_came(two, folders, uneven_file, tmp_path):
    def formats(name: str) -> torch.dtype:
        return torch.float32 if "norm" in name else torch.bfloat16

    model = written_as(folders("llama", **FOUR_LAYERS), tmp_path / "model", formats)
    same_merged(two, model, uneven_file, tmp_path, settings_of(SLICES, {}))
    kept = {
        name: one.dtype
        for file in (tmp_path / "run" / "merged").glob("*.safetensors")
        for name, one in load_file(file).items()
    }
    assert kept == {name: formats(name) for name in kept}


def test_no_process_holds_more_than_a_module_to_merge(two, folders, chat_file, tmp_path):
    """Though all weights are in one file: of a module its weight, what is added, their sum and a copy of that, and the
    adapter twice, from its file and in the model."""
    model = folders("llama", hidden_size=128, intermediate_size=352, num_hidden_layers=8)
    result = train(model, chat_file, tmp_path / "run", training={"steps": 2})
    held = {name: 4 * one.numel() for name, one in load_file(model / "model.safetensors").items()}
    adapter = sum(4 * one.numel() for one in load_file(result.model_path / "adapter_model.safetensors").values())
    how = {"max_shard_size": "1GB", "save_dtype": "auto"}
    given = [str(model), str(result.model_path), str(tmp_path / "made"), how]
    found = two.call("tests.distributed.measuring:merged", *given)
    assert (tmp_path / "made" / "model.safetensors").is_file()
    most = max(each["rise"] for each in found)
    assert max(held.values()) < most < 5 * max(held.values()) + 2 * adapter < sum(held.values()) / 3


def test_an_adapter_of_slices_is_read_again_beside_no_weights(two, folders, chat_file, tmp_path):
    """In the place of the whole base, process 0 holds what it writes, and the two blocks that are gathered at a time to
    see that logits are finite, each with the copy that gloo gathers into."""
    model = folders("llama", hidden_size=128, intermediate_size=352, num_hidden_layers=16)
    settings = {"algorithm": "lora_sft", "lora": LORA, "parallelism": SLICES, "training": {**STEPS, "steps": 1}}
    asked = recipe(model, chat_file, tmp_path / "run", **settings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    found = two.call("tests.distributed.measuring:adapter_written", asked.model_dump(mode="json"))
    final = tmp_path / "run" / "final"
    assert not damage(final)
    held = {name: 4 * one.numel() for name, one in load_file(model / "model.safetensors").items()}
    adapter = sum(4 * one.numel() for one in load_file(final / "adapter_model.safetensors").values())
    assert adapter <= found[0]["rise"] < sum(held.values()) / 3
