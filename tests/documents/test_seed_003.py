"""EasyDeL's page "Supervised Fine-Tuning (SFT) Trainer": each of its snippets, here, on a CPU, on the torch engine.

Names and values are the page's; models and data are tiny ones in folders, and the import lines name this package:
`import easydel as ed` is `import training_hub as ed`. Where there is no JAX, jnp's formats of numbers are torch's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from transformers import AutoTokenizer

import training_hub as ed
from tests.conftest import CONVERSATIONS
from training_hub.trainers import SFTConfig

if find_spec("jax"):
    from jax import numpy as jnp
else:
    import torch as jnp  # whose formats of numbers have the same names

ROOT = Path(__file__).resolve().parents[2]
HAS_WANDB = find_spec("wandb") is not None


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory in which `helpful-base` holds preference pairs, and Capybara.jsonl conversations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for split, count in (("train", 40), ("validation", 20)):
        rows = [
            {
                "chosen": f"\n\nHuman: What comes after {number}?\n\nAssistant: {number + 1}, I think.",
                "rejected": f"\n\nHuman: What comes after {number}?\n\nAssistant: Nothing.",
            }
            for number in range(count)
        ]
        Path("helpful-base").mkdir(exist_ok=True)
        Path(f"helpful-base/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("Capybara.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS[:16]))
    return tmp_path


@pytest.fixture
def llama(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


def hh_rlhf(split: str) -> Any:
    """What the page loads as Anthropic/hh-rlhf."""
    return load_dataset("json", data_dir="helpful-base", split=split)


def recipe_in(folder: str) -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "recipe.yaml").read_text())


def tokens_in(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "plan.json").read_text())


# Configuration


def test_the_configuration_with_every_field_and_its_value():
    sft_config = SFTConfig(
        # Model and training basics
        model_name="SFTTrainer",  # Name of the model
        learning_rate=2e-5,  # Learning rate for optimization
        # Dataset processing parameters
        dataset_text_field=None,  # Name of the text field in the dataset
        add_special_tokens=False,  # Whether to add special tokens
        packing=False,  # Controls whether sequences are packed
        # Packing parameters
        num_of_sequences=1024,  # Number of sequences for packing
        chars_per_token=3.6,  # Characters per token estimate
        # Dataset processing
        dataset_num_proc=None,  # Number of processes for dataset processing
        dataset_batch_size=1000,  # Batch size for dataset tokenization
        dataset_kwargs=None,  # Additional dataset creation arguments
        eval_packing=None,  # Whether to pack eval dataset
        # Batch and training parameters
        total_batch_size=16,  # Total batch size
        num_train_epochs=3,  # Number of training epochs
    )
    said = sft_config.to_dict()
    unsaid = SFTConfig().to_dict()
    assert said == unsaid, "the page writes the defaults"
    trainer = ed.SFTTrainer(arguments=sft_config, model="somewhere", train_dataset=[{"text": "a"}])
    recipe = trainer.recipe
    assert recipe.output == "EasyDeL-Checkpoints/SFTTrainer"
    assert (recipe.training.global_batch_size, recipe.training.epochs, recipe.optimizer.lr) == (16, 3, 2e-5)
    assert (recipe.data.packing, recipe.data.start_token, recipe.data.workers) == (False, False, None)
    assert (recipe.data.chunk_rows, recipe.data.chunk_bytes) == (1000, round(1024 * 3.6 * 4096))


# Basic usage


def basic(llama: str, **changed: Any) -> Any:
    """The page's complete example, up to its trainer."""
    # Load tokenizer
    tokenizer = AutoTokenizer.from_pretrained(llama)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id

    # Load dataset
    dataset = hh_rlhf("train[:10%]")

    # Load model
    model = ed.AutoEasyDeLModelForCausalLM.from_pretrained(llama, dtype=jnp.bfloat16)

    # Create SFT config
    config = ed.SFTConfig(
        **{
            "model_name": "sft_example",
            "save_directory": "sft_checkpoints",
            "dataset_text_field": "chosen",
            "packing": True,
            "learning_rate": 2e-5,
            "learning_rate_end": 5e-6,
            "total_batch_size": 16,
            "num_train_epochs": 3,
            "use_wandb": True,
            "num_of_sequences": 512,
            **changed,
        }
    )

    # Initialize trainer
    return ed.SFTTrainer(
        arguments=config,
        model=model,
        train_dataset=dataset,
        processing_class=tokenizer,
    )


def test_the_complete_example_trains_what_the_page_says(llama: str):
    trainer = basic(llama, use_wandb=HAS_WANDB)
    # Start training
    result = trainer.train().result
    assert result.status == "finished"
    recipe, plan = recipe_in("sft_checkpoints/sft_example"), tokens_in("sft_checkpoints/sft_example")
    assert result.model_path == Path("sft_checkpoints/sft_example/final")
    assert recipe["data"]["columns"] == {"text": "chosen"}
    assert recipe["data"]["chunk_bytes"] == round(512 * 3.6 * 4096)
    assert recipe["model"]["dtype"] == "bfloat16"
    assert (plan["samples"], len(result.history)) == (4, 3), "a tenth of 40 rows, one step for each of three epochs"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    whole = sum(len(tokenizer(row["chosen"])["input_ids"]) + 1 for row in hh_rlhf("train[:10%]"))
    assert plan["tokens"] == whole, "the whole of `chosen`, and the token that ends it"
    rates = [row["learning_rate"] for row in result.history]
    assert rates == pytest.approx([2e-5, 1.5e-5, 1e-5]), "in a straight line to 5e-6, as the step after the last has"


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_use_wandb_without_wandb_says_what_to_install(llama: str):
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'training-hub\[wandb\]'"):
        basic(llama).train()
    assert not Path("sft_checkpoints").exists(), "said before anything is made"


# Command line


COMMAND = """--repo_id {llama} \
  --dataset_name Capybara.jsonl \
  --dataset_split train \
  --dataset_text_field messages \
  --attn_mechanism vanilla \
  --max_sequence_length 2048 \
  --packing True \
  --total_batch_size 16 \
  --learning_rate 2e-5 \
  --learning_rate_end 5e-6 \
  --num_train_epochs 3 \
  --do_last_save \
  --save_steps 1000 \
  --use_wandb"""


def test_the_command_line_of_the_page(llama: str):
    words = COMMAND.format(llama=llama).split() + ([] if HAS_WANDB else ["--use_wandb=false"])
    command = [sys.executable, "-m", "training_hub.scripts.finetune.sft", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    recipe = recipe_in("EasyDeL-Checkpoints/SFTTrainer")
    assert (recipe["data"]["path"], recipe["data"]["format"]) == ("Capybara.jsonl", "messages")
    assert (recipe["model"]["attention"], recipe["training"]["max_seq_len"]) == ("documents", 2048)
    assert (recipe["checkpoint"]["interval"], recipe["checkpoint"]["final"]) == (1000, True)
    assert recipe["lr_scheduler"] | {"name": "linear", "min_lr": 5e-6} == recipe["lr_scheduler"]
    assert (Path("EasyDeL-Checkpoints/SFTTrainer/final") / "model.safetensors").is_file()


# Dataset formats


SIMPLE = {"text": "This is a training example for the language model."}
INSTRUCTION = {
    "instruction": "Write a short poem about machine learning.",
    "response": "Silicon minds learn and grow,\nPatterns found in data's flow.\nMathematical art so precise,\n"
    "Learning once, then twice, then thrice.",
}
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "You are a helpful AI assistant."},
        {"role": "user", "content": "What is machine learning?"},
        {"role": "assistant", "content": "Machine learning is a subset of artificial intelligence..."},
    ]
}


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        (SIMPLE, SIMPLE["text"]),
        (INSTRUCTION, INSTRUCTION["response"]),
        (CONVERSATION, CONVERSATION["messages"][-1]["content"]),  # type: ignore[index]
        ({"prompt": "What is 2 + 2? ", "completion": "It is 4."}, "It is 4."),
    ],
    ids=["text", "instruction", "conversation", "prompt and completion"],
)
def test_a_format_is_recognised_and_its_answer_is_trained(row: dict[str, Any], trained: str, llama: str):
    arguments = ed.SFTConfig(model_name="format", num_train_epochs=1, overrides={"training.preflight": False})
    trainer = ed.SFTTrainer(arguments=arguments, model=llama, train_dataset=[row])
    result = trainer.train().result
    tokenizer = AutoTokenizer.from_pretrained(llama)
    with_end = len(tokenizer(trained)["input_ids"]) + 1
    first = 1 if row is SIMPLE else 0  # nothing predicts the first token of a text
    assert result.plan["trained_tokens"] == with_end - first


# Advanced usage


def test_packing_for_efficient_training(llama: str):
    config = ed.SFTConfig(
        packing=True,  # Enable packing
        num_of_sequences=1024,  # Number of sequences to pack
        chars_per_token=3.6,  # Estimate of characters per token
    )
    recipe = ed.SFTTrainer(arguments=config, model=llama, train_dataset=[SIMPLE]).recipe
    assert recipe.data.packing
    assert recipe.data.chunk_bytes == round(1024 * 3.6 * recipe.training.max_seq_len)


def test_a_custom_evaluation_dataset(llama: str):
    # Load evaluation dataset
    eval_dataset = hh_rlhf("validation[:10%]")
    config = ed.SFTConfig(model_name="evaluated", dataset_text_field="chosen", num_train_epochs=1)

    # Initialize trainer with eval dataset
    trainer = ed.SFTTrainer(
        arguments=config,
        model=ed.AutoEasyDeLModelForCausalLM.from_pretrained(llama),
        train_dataset=hh_rlhf("train[:10%]"),
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    result = trainer.train().result
    assert result.plan["validation_samples"] == 2
    assert result.metrics["validation_loss"] > 0


def test_advanced_learning_rate_scheduling(llama: str):
    config = ed.SFTConfig(
        learning_rate=2e-5,  # Initial learning rate
        learning_rate_end=5e-6,  # Final learning rate
        scheduler=ed.EasyDeLSchedulers.COSINE,  # Cosine schedule
        warmup_steps=500,  # Steps for warmup phase
        optimizer=ed.EasyDeLOptimizers.ADAMW,  # AdamW optimizer
        weight_decay=0.01,  # Weight decay for regularization
    )
    recipe = ed.SFTTrainer(arguments=config, model=llama, train_dataset=[SIMPLE]).recipe
    schedule, optimizer = recipe.lr_scheduler, recipe.optimizer
    assert (schedule.name, schedule.min_lr, schedule.warmup_steps) == ("cosine", 5e-6, 500)
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("AdamW", 2e-5, 0.01)


# Tips


def test_layers_are_unfrozen_gradually(llama: str):
    config = ed.SFTConfig(
        model_name="thaw", num_train_epochs=1, total_batch_size=4, unfreeze_interval=2, unfrozen_blocks=1,
        overrides={"training.preflight": False, "model.dtype": "float32"},
    )  # fmt: skip
    lower = "model.layers.0.mlp.down_proj.weight"
    trainer = ed.SFTTrainer(arguments=config, model=llama, train_dataset=list(CONVERSATIONS[:8]))
    before = trainer.model.state_dict()[lower].clone()
    assert len(trainer.train().result.history) == 2
    assert bool((trainer.model.state_dict()[lower] == before).all()), "its turn comes after two steps"
    longer = ed.SFTTrainer(
        arguments=config.replace(model_name="thawed", num_train_epochs=2),
        model=llama,
        train_dataset=list(CONVERSATIONS[:8]),
    )
    longer.train()
    assert not bool((longer.model.state_dict()[lower] == before).all())
