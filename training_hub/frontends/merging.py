"""`merge_adapter(...)`: an adapter and its base as one model, from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.algorithms import engine_of
from training_hub.errors import BackendError
from training_hub.frontends.dialects import is_live, recipe_from
from training_hub.recipe import Recipe
from training_hub.recipe.load import Layer, layer_of, merge

if TYPE_CHECKING:
    from training_hub.backends import Given

NONE = "(none)"
"""Stands for a setting that is not given."""


def merge_adapter(
    adapter_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    model_path: str | os.PathLike[str] | None = None,
    data_path: Any = None,
    save_dtype: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write an adapter and its base as one ordinary model into a new folder, and compare it with the two.

    adapter_path: folder in PEFT's format, such as final/ of a run of `lora_sft`. It stays as it is.
    output_dir: where the merged model goes; must not exist. It appears whole or not at all.
    model_path: the base, where it is not the one that the adapter names.
    data_path: held-out rows (a file, or rows in memory) on which logits are compared; without it a few built-in texts.
    save_dtype: number format of the merged model; without it that in which the base is stored.
    overrides: any setting of the recipe by its path, {"data.chat_template": "chatml"}.

    The sum is made in float32, of dequantised weights where the adapter was trained beside quantised ones. Returns, and
    writes to merge.json of the folder, how far the logits of both lie apart: rows, tokens, relative (norm of the
    difference over the norm), largest, divergence (KL in nats), agreement (share with the same likeliest token).
    """
    from training_hub.backends import Given

    is_given = data_path is not None and is_live(data_path)
    own = {
        "output": os.fspath(output_dir),
        "model.path": NONE if model_path is None else os.fspath(model_path),
        "model.save_dtype": save_dtype,
        "data.path": None if is_given else data_path if data_path is not None else NONE,
    }
    layer = merge(Layer({path: value for path, value in own.items() if value is not None}), layer_of(overrides))
    live = ("data.path",) if is_given else ()
    recipe = recipe_from(layer, algorithm="sft", backend="torch", live=live)
    return merged(recipe, Given(rows=data_path if is_given else None), adapter_path)


def merged(recipe: Recipe, given: Given, adapter: str | os.PathLike[str]) -> dict[str, float]:
    """What `merge` of the recipe's engine gives. Raises BackendError where it has none."""
    from training_hub.backends import find_backend
    from training_hub.monitoring.console import open_console

    engine: Any = find_backend(engine_of(recipe))
    if not hasattr(engine, "merge"):
        raise BackendError(f"backend {engine.name!r} has no merge(recipe, given, adapter, console).")
    found: dict[str, float] = engine.merge(
        recipe, given, Path(adapter).expanduser(), open_console(recipe.monitoring.console)
    )
    return found
