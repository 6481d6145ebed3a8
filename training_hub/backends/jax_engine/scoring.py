"""How well a saved model does rows: the loss on their trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_hub.backends import Given
from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.batches import Sizes
from training_hub.backends.jax_engine.build import attention_of, build_of, keep_programs, machine_of
from training_hub.backends.jax_engine.forward import Forward
from training_hub.backends.jax_engine.full import Adaptation, Full
from training_hub.backends.jax_engine.loop import Tree, evaluate
from training_hub.backends.jax_engine.lora import LowRank
from training_hub.backends.jax_engine.materials import Materials, load_materials
from training_hub.backends.jax_engine.mesh import Mesh, mesh_of
from training_hub.backends.jax_engine.objective import PLAIN
from training_hub.backends.jax_engine.session import feed_of
from training_hub.backends.jax_engine.step import Steps
from training_hub.data.feed import Feed
from training_hub.evaluation.metrics import perplexity
from training_hub.evaluation.predictions import Sitting
from training_hub.recipe import Recipe
from training_hub.types import Console


@dataclass(frozen=True)
class Saved:
    """A saved model, ready to be measured: what `evaluate` asks of a run."""

    recipe: Recipe
    steps: Steps
    trained: Tree
    frozen: Tree
    feed: Feed
    sizes: Sizes
    mesh: Mesh
    console: Console
    packs_validation: bool


def score(recipe: Recipe, console: Console) -> dict[str, float]:
    """Scores of the model of model.path on the rows of data.path: `rows`, and `loss`, the mean over all trained tokens
    in nats."""
    materials = load_materials(recipe, Given(), console)
    loss = mean_loss(load_saved(recipe, materials, console), materials)
    return {"rows": float(len(materials.prepared.train)), "loss": loss}


def examine(recipe: Recipe, given: Given, console: Console, own: Sequence[Callable[..., Any]] = ()) -> Sitting:
    """Scores of the model of model.path on the rows of data.path, or of `given`: `rows`, `loss` and `perplexity`."""
    materials = load_materials(recipe, given, console)
    loss = mean_loss(load_saved(recipe, materials, console), materials)
    rows = float(len(materials.prepared.train))
    return Sitting((), {"rows": rows, "loss": loss, "perplexity": perplexity(loss)})


def mean_loss(saved: Saved, materials: Materials) -> float:
    """Mean cross-entropy over the trained tokens of all rows, in nats."""
    return evaluate(saved, materials.prepared.train, f"loss: {saved.recipe.model.path}")


def load_saved(recipe: Recipe, materials: Materials, console: Console) -> Saved:
    """The model of model.path on the devices, in the format that a run of it would choose, with the adapter of
    lora.adapter where there is one."""
    keep_programs(recipe)
    machine, shape = machine_of(recipe), materials.shape
    adaptation: Adaptation = Full(shape, materials.source)
    if recipe.lora.adapter is not None:
        adaptation = LowRank(recipe, shape, machine.dtype)
    mesh, feed = mesh_of(recipe.parallelism, shape), feed_of(recipe, materials, machine)
    loaded = files.load(materials.source, shape, console)
    for line in loaded.notes:
        console.say(f"model: {line}")
    trained, frozen = (mesh.place(_lowered(half, machine.dtype)) for half in adaptation.split(loaded.weights))
    build = build_of(shape, attention_of(shape, machine, materials.longest, mesh), machine, mesh, adaptation)
    steps = Steps(Forward(build, "none", machine.is_scanned("none")), PLAIN, mesh)
    sizes = Sizes.of(max(feed.settings.token_budget, materials.longest))
    return Saved(recipe, steps, trained, frozen, feed, sizes, mesh, console, recipe.data.packing)


def _lowered(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Matrices in the format that is computed in, in which they are multiplied anyway."""
    wanted = files.number_format(dtype)
    return {name: weight.astype(wanted) if weight.ndim > 1 else weight for name, weight in weights.items()}
