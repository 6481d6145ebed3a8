"""The same settings give the equal recipe, whether they come as keywords, as YAML or as flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_hub.frontends.cli import recipe_of
from training_hub.frontends.dialects import recipe_from, request_from
from training_hub.recipe import Recipe
from training_hub.recipe.load import dump
from training_hub.recipe.yaml_text import write_yaml

# Each case: keywords of sft(), and the same as recipe paths.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "only what is needed": ({}, {}),
    "the page's example": (
        {"num_epochs": 3, "learning_rate": 1e-5, "effective_batch_size": 2048, "max_seq_len": 2048},
        {
            "training.epochs": 3,
            "optimizer.lr": 1e-5,
            "training.global_batch_size": 2048,
            "training.max_seq_len": 2048,
        },
    ),
    "steps and a schedule": (
        {"max_steps": 10, "lr_scheduler": "linear", "warmup_ratio": 0.1, "lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {
            "training.steps": 10,
            "lr_scheduler.name": "linear",
            "lr_scheduler.warmup_ratio": 0.1,
            "lr_scheduler.min_lr": 1e-7,
        },
    ),
    "trackers and nodes": (
        {"wandb_project": "p", "tensorboard_log_dir": "tb", "nnodes": 2, "node_rank": 1, "rdzv_id": 5},
        {
            "monitoring.wandb": True,
            "monitoring.wandb_project": "p",
            "monitoring.tensorboard": "tb",
            "processes.nodes": 2,
            "processes.node_rank": 1,
            "processes.rdzv_id": 5,
        },
    ),
    "data": (
        {
            "document_column_name": "body",
            "is_pretraining": True,
            "block_size": 64,
            "validation_split": 0.1,
            "overrides": {"data.overlong": "split", "data.shuffle": False, "checkpoint.keep_last": None},
        },
        {
            "data.columns": {"text": "body"},
            "data.pretraining": True,
            "data.block_size": 64,
            "data.validation_fraction": 0.1,
            "data.overlong": "split",
            "data.shuffle": False,
            "checkpoint.keep_last": None,
        },
    ),
}


def from_keywords(backend: str, keywords: dict[str, Any]) -> Recipe:
    request = request_from({"model_path": "m", "data_path": "d", "ckpt_output_dir": "o", **keywords})
    return recipe_from(request.layer, algorithm="sft", backend=backend)


def from_yaml(backend: str, settings: dict[str, Any], folder: Path) -> Recipe:
    tree: dict[str, Any] = {"backend": backend, "output": "o", "model": {"path": "m"}, "data": {"path": "d"}}
    for path, value in settings.items():
        section, _, field = path.partition(".")
        tree.setdefault(section, {})[field] = value
    file = folder / "recipe.yaml"
    file.write_text(write_yaml(tree), encoding="utf-8")
    return recipe_of(["sft", "--config", str(file)])


def from_flags(backend: str, settings: dict[str, Any]) -> Recipe:
    words = ["sft", "--model", "m", "--data", "d", "--output", "o", "--backend", backend]
    for path, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{path}" if value else f"--no-{path}")
        else:
            words += [f"--{path}", "null" if value is None else str(value)]
    return recipe_of(words)


@pytest.mark.parametrize("backend", ["instructlab-training", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_keywords_yaml_and_flags_give_the_equal_recipe(case: str, backend: str, tmp_path: Path):
    keywords, settings = CASES[case]
    recipe = from_keywords(backend, keywords)
    assert from_yaml(backend, settings, tmp_path) == recipe
    assert from_flags(backend, settings) == recipe


def test_different_settings_give_different_recipes():
    recipes = [from_keywords("torch", keywords) for keywords, _ in CASES.values()]
    assert all(one != other for i, one in enumerate(recipes) for other in recipes[:i])


def test_the_saved_recipe_of_a_run_gives_the_equal_recipe_again(tmp_path: Path):
    for keywords, _ in CASES.values():
        recipe = from_keywords("instructlab-training", keywords)
        (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        assert recipe_of(["sft", "--config", str(tmp_path / "recipe.yaml")]) == recipe
