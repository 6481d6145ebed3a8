"""Merged models: an ordinary folder that says what base and adapter say, and an adapter that is still there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.torch_engine.lora.test_quantization import wide_model_folder as wide_model_folder
from tests.backends.torch_engine.lora.test_runs import logits_in_peft, train
from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub import merge_adapter
from training_hub.errors import RecipeError
from training_hub.folders import damage
from training_hub.frontends.cli import main

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def tuned(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("merge") / "run")


def logits_of(folder) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(3, 60)[None]).logits


def test_the_merged_model_says_what_base_and_adapter_say(tuned, tiny_model_folder, chat_file, tmp_path):
    before = {path.name: path.read_bytes() for path in tuned.model_path.iterdir()}
    found = merge_adapter(tuned.model_path, tmp_path / "merged", data_path=str(chat_file))
    torch.testing.assert_close(
        logits_of(tmp_path / "merged"), logits_in_peft(tuned, tiny_model_folder), rtol=0, atol=1e-5
    )
    assert found["relative"] < 1e-5, "float32 weights, rounded once"
    assert found["agreement"] == 1.0
    assert found["rows"] == 16
    said = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert said["deviation"] == found
    assert damage(tmp_path / "merged") == []
    assert {path.name: path.read_bytes() for path in tuned.model_path.iterdir()} == before
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()


def test_the_command_does_the_same_and_refuses_a_folder_that_is_there(tuned, tmp_path, capsys):
    words = ["merge", str(tuned.model_path), "--output", str(tmp_path / "merged")]
    assert main([*words, "--model.save_dtype=bfloat16"]) == 0
    assert "logits deviate by" in capsys.readouterr().out
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    flag = ["merge", "model.save_dtype=float32", "--adapter", str(tuned.model_path), *words[2:]]
    assert main(flag) == 2
    assert "exists, and a merged model gets a folder of its own" in capsys.readouterr().err
    assert main([*words, "--adapter", "other"]) == 2
    assert "ADAPTER: given twice" in capsys.readouterr().err
    assert main(["merge", *words[2:]]) == 2
    assert "ADAPTER: not given. Write training-hub merge out-lora/final --output" in capsys.readouterr().err


def test_a_run_merges_beside_its_adapter_if_asked(tiny_model_folder, chat_file, tmp_path):
    kept = {"data": {"validation_fraction": 0.2}, "lora": {"merge": True}}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **kept)
    assert (result.model_path / "adapter_model.safetensors").is_file()
    said = json.loads((tmp_path / "run" / "merged" / "merge.json").read_text())
    assert said["deviation"]["rows"] == 8
    torch.testing.assert_close(
        logits_of(tmp_path / "run" / "merged"), logits_in_peft(result, tiny_model_folder), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "apart"), [("int4", 0.02), ("int8", 0.001)])
def test_quantised_weights_are_made_dense_before_the_sum(kind, apart, wide_model_folder, chat_file, tmp_path):
    result = train(wide_model_folder, chat_file, tmp_path / "run", model={"quantization": kind})
    found = merge_adapter(result.model_path, tmp_path / "merged", data_path=str(chat_file))
    assert found["relative"] < 1e-5, "the dense weights hold the same numbers"
    # Into the weights as they were before they were quantised, it would be another model.
    (result.model_path / "trained_beside.json").unlink()
    (result.model_path / "manifest.json").unlink()
    merge_adapter(result.model_path, tmp_path / "wrong", data_path=str(chat_file))
    difference = (logits_of(tmp_path / "wrong") - logits_of(tmp_path / "merged")).norm()
    assert difference > apart * logits_of(tmp_path / "merged").norm()


def test_what_cannot_be_merged_is_refused_by_name(tuned, tmp_path, chat_file):
    with pytest.raises(RecipeError, match=r"adapter: .*nowhere holds no adapter_config\.json"):
        merge_adapter(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(RecipeError, match=r"there is no folder .*/gone"):
        merge_adapter(tuned.model_path, tmp_path / "merged", model_path=str(tmp_path / "gone"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_folder_is_scored_as_the_model_that_it_makes(tuned, chat_file, tmp_path):
    from training_hub import evaluate

    merge_adapter(tuned.model_path, tmp_path / "merged")
    folders = [tuned.model_path, tmp_path / "merged"]
    made = evaluate(folders, str(chat_file), ["loss"], overrides={"model.dtype": "float32", "data.cache": False})
    beside, merged = (made.scores[name]["loss"] for name in made.scores)
    assert beside == pytest.approx(merged, rel=1e-5)
    assert beside < tuned.history[0]["loss"] - 0.02


def test_quantised_weights_that_files_hold_turned_are_merged_as_these_hold_them(tiny_model_folder, chat_file, tmp_path):
    """GPT-2's, of which bitsandbytes makes linear layers: a run that merges at its end, and each weight's place."""
    pytest.importorskip("bitsandbytes")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    train(tmp_path / "model", chat_file, tmp_path / "run", model={"quantization": "int4"}, lora={"merge": True})
    base, merged = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "run/merged"))
    assert {name: one.shape for name, one in merged.items()} == {name: one.shape for name, one in base.items()}
    said = json.loads((tmp_path / "run" / "merged" / "merge.json").read_text())["deviation"]
    assert said["relative"] < 1e-5, "float32 weights, rounded once"
