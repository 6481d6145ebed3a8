"""Whether a recipe comes to the same numbers in its layout as in one process: both are run for a few steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.errors import RecipeError
from training_hub.launch import run
from training_hub.recipe import Recipe
from training_hub.types import TrainResult

LIMITS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2}
"""Relative differences that another order of the same sums explains, by the format of forward and backward. Measured
on random models of two layers over four steps: up to 1e-6 in float32."""

MEASURES = ("loss", "grad_norm")


@dataclass(frozen=True)
class Difference:
    """One number of both runs. apart: relative to the one of one process."""

    name: str
    alone: float
    together: float

    @property
    def apart(self) -> float:
        return abs(self.together - self.alone) / max(abs(self.alone), 1e-12)


@dataclass(frozen=True)
class Comparison:
    """What two runs of a recipe differ in. weights: the norm of the difference of the final weights over their norm."""

    steps: tuple[Difference, ...]
    weights: float
    limit: float
    processes: int

    @property
    def holds(self) -> bool:
        worst = max([self.weights, *(each.apart for each in self.steps)])
        return math.isfinite(worst) and worst <= self.limit


def verify(recipe: Recipe, folder: Path, steps: int) -> Comparison:
    """Run `steps` steps of the recipe in one process and in its own layout, in two folders below `folder`.

    Raises RecipeError where its layout is one process, or more than a node.
    """
    if recipe.processes.nodes > 1 or recipe.processes.procs == 1:
        raise _not_several(recipe)
    alone = run(shortened(recipe, folder / "alone", steps, is_alone=True))
    together = run(shortened(recipe, folder / "together", steps))
    if together.plan["processes"] == 1:  # what `gpu` and `auto` came to
        raise _not_several(recipe)
    found = [
        Difference(f"step {one['step']} {name}", float(one[name]), float(other[name]))
        for one, other in zip(alone.history, together.history, strict=True)
        for name in MEASURES
    ]
    limit = LIMITS[str(alone.plan["dtype"])]
    return Comparison(tuple(found), _weights_apart(alone, together), limit, int(together.plan["processes"]))


def _not_several(recipe: Recipe) -> RecipeError:
    asked = recipe.processes
    return RecipeError(
        f"processes: found procs {asked.procs}, nodes {asked.nodes}; verify compares one process with several of this "
        "node. Write processes.procs: 2 or more, and nodes: 1; degrees that multiply to that show the same errors."
    )


def shortened(recipe: Recipe, output: Path, steps: int, *, is_alone: bool = False) -> Recipe:
    """The recipe for a few steps and nothing beside: no validation, trackers, checkpoints or uploads, and no dropout of
    adapters, which each process draws for itself."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude={"evaluation", "hub", "monitoring", "checkpoint"})
    content["output"] = str(output)
    content["training"] |= {"steps": steps, "epochs": None, "preflight": False}
    content["model"] |= {"save_dtype": "float32"}
    content["checkpoint"] = {"minutes": None}
    content["monitoring"] = {"console": recipe.monitoring.console}
    if recipe.algorithm == "lora_sft":
        content["lora"] |= {"dropout": 0.0, "merge": False}
    if is_alone:
        del content["processes"], content["parallelism"]
    return Recipe.model_validate(content)


def _weights_apart(alone: TrainResult, together: TrainResult) -> float:
    difference = size = 0.0
    for (name, one), (other_name, other) in zip(_weights(alone), _weights(together), strict=True):
        if name != other_name:
            raise AssertionError(f"{name} in one final model, {other_name} in the other")
        difference += float(((one - other) ** 2).sum())
        size += float((one**2).sum())
    return math.sqrt(difference / max(size, 1e-30))


def _weights(result: TrainResult) -> Iterator[tuple[str, Any]]:
    """The tensors of a final model in the order of their names, one at a time."""
    from safetensors import safe_open

    assert result.model_path is not None
    files = [safe_open(path, framework="numpy") for path in sorted(result.model_path.glob("*model*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    for name in sorted(where):
        yield name, where[name].get_tensor(name).astype("float64")
