"""A file of a final model holds what transformers writes of its tensors, whichever way they come to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import dot_natural_key

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.saving.exact_pieces import named_tensors
from training_hub.backends.torch_engine.saving.file_plan import Kept, parted
from training_hub.backends.torch_engine.saving.final_file import FinalFile, parts_of
from training_hub.backends.torch_engine.saving.growing_file import METADATA


def about(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def test_experts_are_written_one_by_one_as_they_come(tmp_path):
    model = tiny_model("qwen3-moe")
    model.save_pretrained(tmp_path / "whole")
    tensors = dict(reversed(model.state_dict().items()))
    file = FinalFile(model, tmp_path / "file.safetensors", parts_of(model, about(tensors)))
    for name, tensor in tensors.items():
        file.put(name, tensor)
        assert file.held == 0
    assert file.finish() == []
    assert file.path.read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_file_gets_the_part_of_a_tensor_that_is_its_own(tmp_path):
    model = tiny_model("qwen3-moe")
    name = next(name for name in model.state_dict() if name.endswith("down_proj"))
    (part,) = parts_of(model, about({name: model.state_dict()[name]})).values()
    assert part is not None and len(part) > 2
    first = dict(list(part.items())[:2])
    file = FinalFile(model, tmp_path / "file.safetensors", {name: first})
    assert file.put(name, model.state_dict()[name]) == 2 * model.state_dict()[name][0].numel() * 4
    assert file.finish() == [] and set(load_file(file.path)) == set(first)


def test_formats_that_a_growing_file_does_not_know_are_held_and_written_by_the_library(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.float8_e4m3fn), "b": torch.ones(2)}
    parts = parts_of(tiny_model("llama"), about(tensors))
    assert parts == {"a": None, "b": None}
    file = FinalFile(tiny_model("llama"), tmp_path / "file.safetensors", parts)
    assert [file.put(name, tensor) for name, tensor in tensors.items()] == [3, 8] and file.held == 11
    assert file.finish() == [] and file.held == 0
    save_file(tensors, tmp_path / "whole.safetensors", METADATA)
    assert file.path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt-oss"])
def test_files_are_parted_as_transformers_parts_them(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parted", max_shard_size="20KB")
    wanted = json.loads((tmp_path / "parted" / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: Kept(*one, 0) for name, one in about(named_tensors(model)).items()}
    tensors = {name: tensors[name] for name in sorted(tensors, key=dot_natural_key)}
    files = parted(model, tensors, {name: one.dtype for name, one in tensors.items()}, "20KB")
    keys = {key: file for file, parts in files.items() for part in parts.values() for key in part or ()}
    assert len(files) > 3 and keys == wanted
