"""From torchforge's configuration to a checked recipe, a file, a run: `check`, `show`, `save`, `train`.

A configuration is the nested mapping that its YAML holds; `${...}`, hf:// and all that a file may say are understood
in it. `assigned` are texts such as "training.steps=10", which win over it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.errors import DataError
from training_hub.folders import write_text
from training_hub.frontends.dialects import recipe_from
from training_hub.frontends.forge.c4 import NAMED
from training_hub.frontends.forge.file import read_config, wishes
from training_hub.frontends.forge.meaning import Asked, asked
from training_hub.recipe import Recipe
from training_hub.recipe.yaml_text import write_yaml

if TYPE_CHECKING:
    from training_hub.types import TrainResult

ALGORITHM, BACKEND = "sft", "torch"

Config = Mapping[str, Any]


def load(named: str) -> dict[str, Any]:
    """The configuration in a file, or of a preset: llama3_8b, llama3_70b, qwen3_8b, qwen3_32b, tiny."""
    return read_config(named)


def check(config: Config, *assigned: str) -> Recipe:
    """The recipe that a configuration stands for. Raises RecipeError that lists everything that is wrong with it."""
    return recipe_of(_asked(config, assigned))


def show(config: Config) -> str:
    """The configuration as YAML."""
    return write_yaml(copy.deepcopy(dict(config)))


def save(config: Config, path: str | os.PathLike[str]) -> Path:
    """Write a configuration to a YAML file, once it is free of mistakes. Raises RecipeError where it is not."""
    check(config)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, show(config))
    return file


def train(config: Config, *assigned: str) -> TrainResult:
    """Train as a configuration says. Raises RecipeError listing everything that is wrong, and all that a run raises."""
    return run(_asked(config, assigned))


def recipe_of(wanted: Asked) -> Recipe:
    """The recipe of what was asked for. Raises RecipeError."""
    return recipe_from(wanted.layer, algorithm=ALGORITHM, backend=BACKEND)


def run(wanted: Asked) -> TrainResult:
    """Train what was asked for."""
    recipe = recipe_of(wanted)
    if wanted.hides_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for them, here and in the processes of the run

    from training_hub.launch import run as launch
    from training_hub.monitoring.console import open_console

    console = open_console(recipe.monitoring.console if os.environ.get("RANK", "0") == "0" else "off")
    for note in wanted.notes:
        console.say(f"recipe: {note}")
    try:
        return launch(recipe)
    except DataError as error:
        named = NAMED.get(wanted.dataset)
        if named is None or not named.hub or recipe.data.path != named.hub:
            raise
        remedy = f"{wanted.dataset} lies on the hub as {named.hub}. Without a network write training.dataset: c4_test"
        raise DataError([*error.problems, f"training.dataset: {remedy}"]) from error


def _asked(config: Config, assigned: Iterable[str]) -> Asked:
    return asked(wishes(config, assigned), num_gpus)


def num_gpus() -> int:
    """GPUs of this host; 0 where there is none."""
    from training_hub.backends import Several, find_backend
    from training_hub.backends.torch_engine.loading.model import choose_device  # the engine counts a CPU as one device

    engine = find_backend(BACKEND)
    return engine.num_devices() if isinstance(engine, Several) and choose_device().type != "cpu" else 0
