"""Adapters beside weights of 4 and 8 bits: the same training, less memory, never skipped in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.backends.torch_engine.lora.test_runs import adapter_of, same_adapters, train
from tests.invariants.run import recipe
from tests.invariants.test_resume import EVERY_STEP, StopAt
from training_hub.backends.torch_engine.loading import quantization
from training_hub.errors import RecipeError, TrainingError

pytest.importorskip("peft")
KINDS = [
    pytest.param(
        "int4", marks=pytest.mark.skipif(not quantization.find_spec("bitsandbytes"), reason="no bitsandbytes")
    ),
    pytest.param("int8", marks=pytest.mark.skipif(not quantization.find_spec("torchao"), reason="no torchao")),
]

# What a step of 4 bits changes of the loss of a model of random weights, whose loss is near the uniform one anyway.
APART = {"int4": 0.01, "int8": 0.002}


@pytest.fixture(scope="module")
def wide_model_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model at width 64, so that rows are whole blocks of NF4."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    config = AutoConfig.from_pretrained(tiny_model_folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unquantised(wide_model_folder, chat_file, tmp_path_factory):
    return train(wide_model_folder, chat_file, tmp_path_factory.mktemp("none") / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_follows_that_of_unquantised_weights(kind, unquantised, wide_model_folder, chat_file, tmp_path):
    result = train(wide_model_folder, chat_file, tmp_path / "run", model={"quantization": kind})
    for mine, theirs in zip(result.history, unquantised.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=APART[kind])
        assert mine["loss"] != theirs["loss"], "nothing was quantised"
    proofs = json.loads((tmp_path / "run" / "preflight.json").read_text())["proofs"]
    assert {each["status"] for each in proofs} <= {"holds", "left out"}
    assert result.plan["parameters"] == unquantised.plan["parameters"]
    assert result.plan["memory_gib"]["weights"] < 0.7 * unquantised.plan["memory_gib"]["weights"]
    assert result.plan["memory_gib"]["activations"] == unquantised.plan["memory_gib"]["activations"]
    assert result.plan["quantization"]["name"] == kind
    assert len(result.plan["quantization"]) == 2


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_plan_counts_what_is_not_quantised_in_the_format_that_computes(
    dtype, width, wide_model_folder, chat_file, tmp_path
):
    """The files are in float32: what bits save is saved of what the run would hold, not of what the files do."""
    asked = {"quantization": "int8", "dtype": dtype}
    result = train(wide_model_folder, chat_file, tmp_path / "run", model=asked, training={"steps": 1})
    base = load_file(wide_model_folder / "model.safetensors")
    numbers = {name: one.numel() for name, one in base.items()}
    linear = sum(count for name, count in numbers.items() if name.endswith("_proj.weight"))
    others = sum(numbers.values()) - linear + sum(one.numel() for one in adapter_of(result).values())
    assert result.plan["memory_gib"]["weights"] * 2**30 == pytest.approx(linear + width * others)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_fails_goes_on_to_the_same_bits(kind, wide_model_folder, chat_file, tmp_path):
    low = {"quantization": kind, "dtype": "bfloat16"}
    whole = train(wide_model_folder, chat_file, tmp_path / "whole", model=low)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(wide_model_folder, chat_file, tmp_path / "run", [StopAt(4)], model=low, checkpoint=EVERY_STEP)
    assert same_adapters(train(wide_model_folder, chat_file, tmp_path / "run", model=low, checkpoint=EVERY_STEP), whole)
    assert {tensor.dtype for tensor in adapter_of(whole).values()} == {torch.float32}


@pytest.mark.parametrize("algorithm", ["sft", "osft"])
def test_weights_that_train_are_not_quantised(algorithm, tiny_model_folder, chat_file, tmp_path):
    wanted: dict[str, Any] = {"osft": {"unfreeze_rank_ratio": 0.5}} if algorithm == "osft" else {}
    with pytest.raises(ValueError, match=r"model\.quantization: int4 numbers cannot move .* algorithm: lora_sft"):
        recipe(
            tiny_model_folder, chat_file, tmp_path / "r", algorithm=algorithm, model={"quantization": "int4"}, **wanted
        )


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(
    monkeypatch, tiny_model_folder, chat_file, tmp_path
):
    there = quantization.find_spec
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    with pytest.raises(RecipeError, match=r"needs bitsandbytes.*pip install 'training-hub\[bitsandbytes\]'"):
        train(tiny_model_folder, chat_file, tmp_path / "run", model={"quantization": "int4"})


def test_a_start_out_of_the_weights_is_refused(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.tuner: pissa takes its start out of the weights"):
        train(tiny_model_folder, chat_file, tmp_path / "r", lora={"tuner": "pissa"}, model={"quantization": "int8"})
