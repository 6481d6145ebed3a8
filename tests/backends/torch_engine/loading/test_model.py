"""Loading a model: whole or not at all, and every problem of a folder named before a weight is read."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.backends.torch_engine.tiny_models import FAMILIES, from_config, tiny_model
from training_hub.backends.shared.model_folder import folder_problems
from training_hub.backends.torch_engine.attention import DOCUMENTS
from training_hub.backends.torch_engine.loading.model import LoadedModel, choose_device, choose_dtype, load_model
from training_hub.errors import BackendError, RecipeError
from training_hub.recipe import Recipe

CPU = torch.device("cpu")


def load(path: Path | str, dtype: torch.dtype = torch.float32, model: Any = None, **chosen: Any) -> LoadedModel:
    recipe = Recipe.model_validate({"output": "unused", "model": {"path": str(path), **chosen}})
    return load_model(recipe, CPU, dtype, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder: tiny untied Llama in two shards."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_model("llama").save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that may be broken."""
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_from_its_folder_weight_for_weight(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.attention == DOCUMENTS
    assert loaded.original_dtype == torch.float32
    assert loaded.notes == ()
    assert not loaded.model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name


def test_the_saved_config_is_not_touched_by_what_training_needs(folder: Path, tmp_path: Path) -> None:
    before = json.loads((folder / "config.json").read_text())
    load(folder).model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == before


def test_the_original_format_is_that_of_the_weights_whatever_the_config_says(tmp_path: Path) -> None:
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    change_config(tmp_path, dtype="float32")
    loaded = load(tmp_path, torch.float64)
    assert loaded.original_dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float64}


def test_a_live_model_is_used_as_it_is_and_a_conversion_is_told() -> None:
    model = tiny_model("llama")
    assert load("unused", model=model).model is model
    loaded = load("unused", torch.bfloat16, model=model)
    assert loaded.notes == ("the given model was converted from float32 to bfloat16",)
    assert loaded.original_dtype == torch.float32
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_that_cannot_use_our_attention_keeps_its_own_and_says_so() -> None:
    import transformers

    config = transformers.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    loaded = load("unused", model=from_config(config))
    assert loaded.attention == "sdpa"
    assert len(loaded.notes) == 1 and "transformers' own (sdpa)" in loaded.notes[0]


def test_varlen_attention_on_a_cpu_is_refused_with_the_remedy(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"varlen needs a CUDA device.*set model.attention to documents"):
        load(folder, attention="varlen")


def test_unexpected_weights_are_noted(folder: Path) -> None:
    shard = shards(folder)[0]
    save_file({**load_file(shard), "vision.weight": torch.zeros(2)}, shard, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["vision.weight"] = shard.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (note,) = load(folder).notes
    assert "1 weights" in note and "vision.weight" in note


def test_missing_weights_are_all_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"2 weights of LlamaForCausalLM.*lm_head.weight, model.layers.1.mlp.up_proj"):
        load(tmp_path)


def test_weights_of_another_shape_are_all_named(folder: Path) -> None:
    change_config(folder, intermediate_size=40)
    with pytest.raises(RecipeError) as caught:
        load(folder)
    assert len(caught.value.problems) == 6
    assert (
        "gate_proj.weight has shape (48, 32) in the files, but config.json makes it (40, 32)"
        in caught.value.problems[1]
    )


def replace_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def as_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")


def only(folder: Path, name: str, data: bytes) -> None:
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / name).write_bytes(data)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing. Give the folder"),
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "holds an adapter: give its base as model.path",
    ),
    "config in a folder below": (
        lambda folder: shutil.move(folder / "config.json", (folder / "hf").mkdir() or folder / "hf" / "config.json"),
        "Did you mean .*llama/hf?",
    ),
    "config not JSON": (replace_config("{"), "config.json is not valid JSON"),
    "config a list": (replace_config("[]"), "config.json does not hold an object"),
    "config an LFS pointer": (
        lambda folder: as_lfs_pointer(folder / "config.json"),
        "config.json is a Git LFS pointer",
    ),
    "no model_type": (lambda folder: change_config(folder, model_type=None), "has no model_type"),
    "not causal": (
        lambda folder: change_config(folder, model_type="t5"),
        "'t5' has no causal language model in the installed transformers",
    ),
    "classifier": (
        lambda folder: change_config(folder, architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification does not predict next tokens",
    ),
    "remote code": (
        lambda folder: change_config(folder, model_type="homemade", auto_map={"AutoConfig": "code.Config"}),
        "needs Python code.*set model.trust_remote_code to true",
    ),
    "hidden implementation": (
        lambda folder: change_config(folder, text_config={"_attn_implementation_internal": "someone/kernel"}),
        "config.json text_config sets _attn_implementation_internal.*Remove the key",
    ),
    "quantized": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "fp8"}),
        r"quantized \(fp8\) and cannot be trained",
    ),
    "shard missing": (
        lambda folder: shards(folder)[1].unlink(),
        "model-00002-of-.*, named in .*index.json, is missing",
    ),
    "shard an LFS pointer": (
        lambda folder: as_lfs_pointer(shards(folder)[0]),
        "model-00001-of-.* is a Git LFS pointer",
    ),
    "shard cut short": (
        lambda folder: shards(folder)[0].write_bytes(shards(folder)[0].read_bytes()[:-10]),
        "model-00001-of-.* is cut short: .* bytes. Fetch it again",
    ),
    "shard not safetensors": (
        lambda folder: shards(folder)[0].write_bytes(b"<html>not found</html>"),
        "is not a safetensors file",
    ),
    "header not an object": (
        lambda folder: shards(folder)[0].write_bytes(struct.pack("<Q", 2) + b"[]"),
        "is not a safetensors file",
    ),
    "index not JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "index.json does not hold a weight_map",
    ),
    "index missing": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "Fetch the missing index"),
    "pickle": (lambda folder: only(folder, "pytorch_model.bin", b"x"), "pickle files .* run code when they are read"),
    "no weights": (lambda folder: only(folder, "README.md", b"x"), "there are no weights"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_with_the_remedy(case: str, folder: Path) -> None:
    break_it, message = BROKEN[case]
    assert folder_problems(str(folder)) == []
    break_it(folder)
    with pytest.raises(RecipeError, match=f"(?s)model.path {folder}: .*{message}"):
        load(folder)


def test_all_problems_of_a_folder_are_listed_at_once(folder: Path) -> None:
    (folder / "config.json").unlink()
    as_lfs_pointer(shards(folder)[0])
    shards(folder)[1].unlink()
    assert len(folder_problems(str(folder))) == 3


def test_a_path_that_is_not_there_is_a_problem_and_a_hub_name_is_not(tmp_path: Path) -> None:
    assert "there is no folder" in folder_problems(str(tmp_path / "nothing"))[0]
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file" in folder_problems(str(file))[0]
    assert folder_problems("someone/some-model.v2") == folder_problems("gpt2") == []


def test_code_in_the_folder_is_no_problem_once_it_is_trusted(folder: Path) -> None:
    change_config(folder, model_type="homemade", auto_map={"AutoConfig": "code.Config"})
    assert folder_problems(str(folder), trust_remote_code=True) == []


def test_automatic_format_is_bfloat16_only_where_the_processor_multiplies_it() -> None:
    file = Path("/proc/cpuinfo")
    flags = file.read_text(encoding="utf-8").split() if file.exists() else []
    multiplies = "amx_bf16" in flags or "avx512_bf16" in flags
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if multiplies else torch.float32)
    assert choose_dtype("float64", CPU) == torch.float64
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_device_is_the_gpu_where_there_is_one() -> None:
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
