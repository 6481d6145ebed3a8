"""One real run through the real seam, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from training_hub.backends import Given
from training_hub.launch import run
from training_hub.recipe import Recipe
from training_hub.types import TrainResult


def recipe(model: Path, data: Path, output: Path, /, **sections: Any) -> Recipe:
    """A small float32 run without console or cache; `sections` are merged over it."""
    base: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"path": str(data), "cache": False},
        "training": {"global_batch_size": 8, "max_seq_len": 256},
        "optimizer": {"lr": 1e-3},
        "monitoring": {"console": "off"},
        "checkpoint": {"minutes": None},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    if not {"epochs", "steps"} & base["training"].keys():
        base["training"]["epochs"] = 1
    return Recipe.model_validate({**base, "output": str(output)})


def train(model: Path, data: Path, output: Path, watchers: Any = (), /, **sections: Any) -> TrainResult:
    return run(recipe(model, data, output, **sections), Given(watchers=watchers))


def final_weights(result: TrainResult) -> dict[str, Any]:
    assert result.model_path is not None
    return load_file(result.model_path / "model.safetensors")
