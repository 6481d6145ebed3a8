"""Settings that contradict each other or would do nothing are found before anything is loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.check import NEEDS, RIVALS
from training_hub.recipe.findings import Names
from training_hub.recipe.load import build
from training_hub.recipe.names import all_settings
from training_hub.recipe.sections import Model, Monitoring

MINIMAL = {"model.path": "m", "output": "o"}


def problems_of(settings: dict[str, Any], **arguments: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build({**MINIMAL, **settings}, **arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    ("wrong", "right", "named"),
    [
        ({"training.epochs": 1, "training.steps": 2}, {"training.steps": 2}, ["training.epochs", "training.steps"]),
        (
            {"lr_scheduler.warmup_steps": 0, "lr_scheduler.warmup_ratio": 0.1},
            {"lr_scheduler.warmup_ratio": 0.1},
            ["lr_scheduler.warmup_steps", "lr_scheduler.warmup_ratio"],
        ),
        (
            {"data.validation": "v", "data.validation_fraction": 0.1},
            {"data.validation": "v"},
            ["data.validation", "data.validation_fraction"],
        ),
        (
            {"processes.rdzv_endpoint": "a:1", "processes.master_addr": "a"},
            {"processes.master_addr": "a"},
            ["processes.rdzv_endpoint", "processes.master_addr"],
        ),
        (
            {"data.block_size": 8},
            {"data.block_size": 8, "data.pretraining": True},
            ["data.block_size", "data.pretraining"],
        ),
        ({"data.cache_dir": "c", "data.cache": False}, {"data.cache_dir": "c"}, ["data.cache_dir", "data.cache"]),
        (
            {"training.max_tokens_per_gpu": 10, "training.max_seq_len": 11},
            {"training.max_tokens_per_gpu": 11, "training.max_seq_len": 11},
            ["training.max_tokens_per_gpu", "training.max_seq_len"],
        ),
        (
            {
                "data.pretraining": True,
                "data.block_size": 9,
                "training.max_seq_len": 8,
                "training.max_tokens_per_gpu": 8,
            },
            {
                "data.pretraining": True,
                "data.block_size": 8,
                "training.max_seq_len": 8,
                "training.max_tokens_per_gpu": 8,
            },
            ["training.max_tokens_per_gpu", "data.block_size"],
        ),
        (
            {"optimizer.momentum": 0.9},
            {"optimizer.momentum": 0.9, "optimizer.name": "SGD"},
            ["momentum", "optimizer.name"],
        ),
        ({"optimizer.beta1": 0.8, "optimizer.name": "SGD"}, {"optimizer.beta1": 0.8}, ["optimizer.beta1"]),
        ({"optimizer.lr": 2}, {"optimizer.lr": 2, "optimizer.name": "SGD"}, ["optimizer.lr"]),
        ({"lr_scheduler.min_lr": 1e-3}, {"lr_scheduler.min_lr": 1e-6}, ["lr_scheduler.min_lr", "optimizer.lr"]),
        (
            {"lr_scheduler.min_lr": 1e-6, "lr_scheduler.name": "constant"},
            {"lr_scheduler.min_lr": 1e-6, "lr_scheduler.name": "wsd"},
            ["lr_scheduler.min_lr", "cosine or"],
        ),
        (
            {"lr_scheduler.name": "wsd", "lr_scheduler.warmup_ratio": 0.6, "lr_scheduler.decay_ratio": 0.5},
            {"lr_scheduler.name": "wsd", "lr_scheduler.warmup_ratio": 0.5, "lr_scheduler.decay_ratio": 0.5},
            ["lr_scheduler.warmup_ratio", "lr_scheduler.decay_ratio"],
        ),
        (
            {"monitoring.wandb_project": "p"},
            {"monitoring.wandb_project": "p", "monitoring.wandb": True},
            ["wandb: true"],
        ),
        (
            {"monitoring.mlflow_run_name": "p"},
            {"monitoring.mlflow_run_name": "p", "monitoring.mlflow": True},
            ["mlflow"],
        ),
        ({"processes.procs": 0}, {"processes.procs": "auto"}, ["processes.procs", "at least 1, auto or gpu"]),
        (
            {"processes.node_rank": 1},
            {"processes.node_rank": 1, "processes.nodes": 2},
            ["node_rank", "processes.nodes"],
        ),
        (
            {"processes.master_port": 1},
            {"processes.master_port": 1, "processes.master_addr": "a"},
            ["processes.master_port", "processes.master_addr"],
        ),
        (
            {"checkpoint.keep_best": True},
            {"checkpoint.keep_best": True, "data.validation": "v"},
            ["checkpoint.keep_best", "data.validation_fraction: 0.05"],
        ),
        (
            {"training.activation_checkpointing": "memory_budget"},
            {"training.activation_checkpointing": "memory_budget", "training.compile": True},
            ["training.activation_checkpointing: memory_budget", "training.compile: true"],
        ),
        (
            {"training.activation_memory_budget": 0.2},
            {
                "training.activation_memory_budget": 0.2,
                "training.activation_checkpointing": "memory_budget",
                "training.compile": True,
            },
            ["training.activation_memory_budget: 0.2 would change nothing"],
        ),
        (
            {"training.compile": True, "training.activation_checkpointing": "full"},
            {"training.compile": True, "training.activation_checkpointing": "none"},
            ["training.compile: torch compiles nothing within", "training.activation_checkpointing: memory_budget"],
        ),
        (
            {"training.compile": True, "algorithm": "lora_sft", "lora.tuner": "oft"},
            {"training.compile": True, "algorithm": "lora_sft", "lora.tuner": "dora"},
            ["training.compile: true does not go with lora.tuner: oft", "training.compile: false"],
        ),
        (
            {"training.cuda_graphs": True, "model.attention": "documents"},
            {"training.cuda_graphs": True, "model.attention": "varlen"},
            ["training.cuda_graphs: true does not go with model.attention: documents", "training.cuda_graphs: false"],
        ),
        (
            {"training.cuda_graphs": True, "loss.neftune_noise_alpha": 5.0},
            {"training.cuda_graphs": True, "loss.label_smoothing": 0.1},
            ["training.cuda_graphs: true does not go with loss.neftune_noise_alpha: 5.0"],
        ),
        (
            {"training.cuda_graphs": True, "algorithm": "lora_sft", "lora.tuner": "adalora"},
            {"training.cuda_graphs": True, "algorithm": "lora_sft", "lora.tuner": "dora"},
            ["training.cuda_graphs: true does not go with lora.tuner: adalora"],
        ),
        (
            {"training.cuda_graphs": True, "algorithm": "osft", "osft.unfreeze_rank_ratio": 0.3},
            {"training.cuda_graphs": True, "algorithm": "lora_sft"},
            ["training.cuda_graphs: true does not go with algorithm: osft"],
        ),
        (
            {"checkpoint.max_shard_size": "5 GiB"},
            {"checkpoint.max_shard_size": "5 GB"},
            ["checkpoint.max_shard_size: found '5 GiB'", "KB, MB, GB or TB", "checkpoint.max_shard_size: 50GB"],
        ),
        (
            {"algorithm": "lora_sft", "checkpoint.max_shard_size": "5GB"},
            {"algorithm": "lora_sft", "checkpoint.max_shard_size": "5GB", "lora.merge": True},
            ["checkpoint.max_shard_size: 5GB would change nothing", "lora.merge: true"],
        ),
        (
            {"distillation.temperature": 2.0},
            {"distillation.temperature": 2.0, "distillation.teacher": "t"},
            ["distillation.temperature", "distillation.teacher: path/to/teacher"],
        ),
        (
            {"distillation.teacher": "t", "distillation.beta": 0.3},
            {"distillation.teacher": "t", "distillation.beta": 0.3, "distillation.divergence": "jensen_shannon"},
            ["distillation.beta", "divergence: jensen_shannon"],
        ),
        (
            {"distillation.teacher": "t", "distillation.cache": "sampled", "distillation.divergence": "reverse_kl"},
            {"distillation.teacher": "t", "distillation.cache": "top_k", "distillation.divergence": "reverse_kl"},
            ["distillation.cache", "forward_kl"],
        ),
        (
            {"distillation.teacher": "t", "loss.dft": True},
            {"distillation.teacher": "t", "loss.dft": True, "distillation.alpha": 0.5},
            ["loss.dft", "distillation.alpha: 0.7"],
        ),
        (
            {"distillation.teacher": "t", "distillation.prompt": "p", "data.pretraining": True},
            {"distillation.teacher": "t", "distillation.prompt": "p"},
            ["distillation.prompt", "data.pretraining"],
        ),
        (
            {"evaluation.interval": 5},
            {"evaluation.interval": 5, "data.validation_fraction": 0.1},
            ["evaluation.interval", "validation rows"],
        ),
    ],
)
def test_a_contradiction_names_its_settings_and_the_right_way_passes(wrong: dict, right: dict, named: list[str]):
    found = problems_of(wrong)
    assert len(found) == 1
    assert all(name in found[0] for name in named)
    build({**MINIMAL, **right})
    Recipe.model_validate(nested({**MINIMAL, **right}))
    if not named_elsewhere(wrong):
        with pytest.raises(ValidationError, match=re.escape(found[0])):
            Recipe.model_validate(nested({**MINIMAL, **wrong}))


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        section, _, name = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def named_elsewhere(settings: dict[str, Any]) -> bool:
    """Whether something handed over beside the recipe can put these settings right: validation rows."""
    return bool({"checkpoint.keep_best", "evaluation.interval"} & set(settings))


def test_a_recipe_made_by_hand_is_as_strict_and_repeats_no_password():
    tracking = Monitoring(mlflow=True, mlflow_tracking_uri="http://me:pa55@host")
    with pytest.raises(ValidationError, match=r"mlflow_tracking_uri: holds a password") as caught:
        Recipe(output="o", model=Model(path="m"), monitoring=tracking)
    assert "pa55" not in str(caught.value)


def test_the_texts_that_users_of_training_hub_match():
    both = problems_of({"data.pretraining": True, "data.unmask": True})
    text = "Cannot use both is_pretraining=True and unmask_messages=True. These are mutually exclusive modes."
    assert both == [text]
    short = problems_of({"training.max_tokens_per_gpu": 10}, spelled={"training.max_tokens_per_gpu": "max_batch_len"})
    assert "the `max_batch_len` cannot be less than `max_seq_len`: " in short[0]
    assert "Write max_batch_len=4096" in short[0]


def test_live_validation_rows_are_validation_rows():
    recipe = build({**MINIMAL, "checkpoint.keep_best": True}, live=["data.validation"])
    assert recipe.checkpoint.keep_best


def test_a_contradiction_with_a_wrong_setting_is_not_said():
    found = problems_of({"training.max_tokens_per_gpu": 10, "training.max_seq_len": "long"})
    assert len(found) == 1
    assert found[0].startswith("training.max_seq_len: found 'long'")


def test_a_contradiction_is_said_beside_other_problems():
    found = problems_of({"training.epochs": 1, "training.steps": 2, "seed": -1})
    assert len(found) == 2


def test_the_tables_name_settings_that_exist():
    named = {*NEEDS, *(owner for owner, _ in NEEDS.values()), *(path for pair in RIVALS for path in pair)}
    assert named <= set(all_settings())


def test_advice_is_written_as_the_caller_writes():
    names = Names({"training.epochs": "num_epochs", "output": "--output"})
    assert names.write("training.epochs", 1) == "num_epochs=1"
    assert names.write("output", "a b") == "--output a b"
    assert names.write("model.path", "1e-5") == "model.path: '1e-5'"
    assert names("training.epochs") == "training.epochs (num_epochs)"
    assert names("output") == "output"
