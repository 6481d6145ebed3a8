"""`lora_sft` and `training-hub lora-sft`: the words of training_hub 0.11 for our recipe."""

from __future__ import annotations

from typing import Any

import pytest

from training_hub import AlgorithmRegistry, lora_sft
from training_hub.errors import RecipeError
from training_hub.frontends.cli import main, recipe_of
from training_hub.frontends.dialects import recipe_from, request_from
from training_hub.recipe import Recipe

GIVEN = {"model_path": "m", "data_path": "d", "ckpt_output_dir": "o"}


def recipe(backend: str = "unsloth", **keywords: Any) -> Recipe:
    request = request_from({**GIVEN, **keywords}, "lora_sft")
    return recipe_from(request.layer, algorithm="lora_sft", backend=backend)


def test_the_backend_of_training_hub_brings_its_defaults():
    made = recipe()
    assert (made.lora.r, made.lora.alpha, made.optimizer.lr, made.training.max_seq_len) == (16, 32, 2e-4, 2048)
    assert (made.training.epochs, made.training.global_batch_size, made.lr_scheduler.name) == (3, 2, "linear")
    assert AlgorithmRegistry.list_backends("lora_sft") == ["unsloth", "torch", "jax"]


def test_a_batch_is_what_a_device_takes_times_passes_times_processes():
    assert recipe(micro_batch_size=4).training.global_batch_size == 4
    assert recipe(gradient_accumulation_steps=8).training.global_batch_size == 16
    both = recipe(micro_batch_size=4, gradient_accumulation_steps=8, nproc_per_node=2, nnodes=2)
    assert both.training.global_batch_size == 128
    with pytest.raises(RecipeError, match="micro_batch_size: given beside effective_batch_size"):
        recipe(micro_batch_size=4, effective_batch_size=16)
    with pytest.raises(RecipeError, match="gradient_accumulation_steps: found 0; allowed: a whole number"):
        recipe(gradient_accumulation_steps=0)


def test_keywords_yaml_and_flags_give_the_equal_recipe(tmp_path):
    made = recipe("torch", lora_r=8, lora_alpha=16, target_modules=["q_proj"], learning_rate=1e-4, bf16=False)
    flags = ["--lora.r=8", "--lora.alpha=16", "--lora.target_modules=[q_proj]", "--learning-rate=1e-4"]
    shared = ["--model=m", "--data=d", "--output=o", "--model.dtype=float32"]
    assert recipe_of(["lora-sft", *shared, *flags]) == made
    assert recipe_of(["lora_sft", *shared, *flags]) == made
    (tmp_path / "run.yaml").write_text(
        "algorithm: lora_sft\nmodel: {path: m, dtype: float32}\ndata: {path: d}\noutput: o\n"
        "lora: {r: 8, alpha: 16, target_modules: [q_proj]}\noptimizer: {lr: 1.0e-4}\n"
    )
    assert recipe_of(["lora-sft", "--config", str(tmp_path / "run.yaml")]) == made


def test_the_formats_and_columns_of_training_hub_are_ours():
    made = recipe(dataset_type="alpaca", field_instruction="ask", field_output="answer", eval_data_path="v")
    assert made.data.format == "instruction"
    assert made.data.columns == {"instruction": "ask", "output": "answer"}
    assert made.data.validation == "v"
    with pytest.raises(RecipeError, match="dataset_type: found 'parquet'; allowed: chat_template"):
        recipe(dataset_type="parquet")
    with pytest.raises(RecipeError, match="enable_model_splitting: found true; allowed: false"):
        recipe(enable_model_splitting=True)


def test_both_doors_train_an_adapter(tiny_model_folder, chat_file, tmp_path, capsys):
    overrides = {"model.dtype": "float32", "data.cache": False, "monitoring.console": "off"}
    result = lora_sft(
        str(tiny_model_folder), str(chat_file), str(tmp_path / "a"), lora_r=4, max_steps=2, overrides=overrides
    )
    assert result.model_path is not None
    assert (result.model_path / "adapter_config.json").is_file()
    flags = ["--lora.r=4", "--steps=2", "--backend=unsloth", "--model.dtype=float32", "--monitoring.console=off"]
    named = ["--model", str(tiny_model_folder), "--data", str(chat_file), "--output", str(tmp_path / "b")]
    assert main(["lora-sft", *named, *flags, "--no-data.cache"]) == 0
    assert "final" in capsys.readouterr().out
    first, second = ((tmp_path / one / "final" / "adapter_model.safetensors").read_bytes() for one in "ab")
    assert first == second
