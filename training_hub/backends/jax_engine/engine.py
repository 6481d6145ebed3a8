"""The jax engine as a backend: what it refuses, and where it begins. JAX itself is loaded by `train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training_hub.algorithms import find_algorithm
from training_hub.backends import Given, Voice
from training_hub.backends.jax_engine.refusals import missing_packages, refusals
from training_hub.backends.jax_engine.shapes import config_problems, read_config, shape_of
from training_hub.backends.shared.model_folder import folder_problems, hub_problem
from training_hub.errors import BackendError, RecipeError
from training_hub.evaluation.judging import objections as metric_objections
from training_hub.evaluation.predictions import Sitting
from training_hub.recipe import Recipe
from training_hub.types import Console, Proof, TrainResult


class JaxEngine:
    """Trains with JAX on whatever devices it finds: CPUs, GPUs, TPUs."""

    name = "jax"

    def objections(self, recipe: Recipe) -> list[str]:
        """Why this recipe cannot run here; cheap checks that load no weights, and no JAX."""
        asked = recipe.evaluation
        of_metrics = metric_objections(asked.metrics) if asked.generate else []
        return [*missing_packages(), *refusals(recipe), *_model_problems(recipe), *of_metrics]

    def plan(self, recipe: Recipe, console: Console, *, measures: bool) -> dict[str, Any]:
        """The plan of a run of this recipe here, as its plan.json says it, without loading weights.

        measures: also time a matrix product, and say as `time` how long the run takes at least.
        """
        problems = [*missing_packages(), *refusals(recipe), *_model_problems(recipe, with_weights=False)]
        if problems:
            raise RecipeError(problems)
        from training_hub.backends.jax_engine.planner import plan

        return plan(recipe, console, measures=measures)

    def check(self, recipe: Recipe, given: Given) -> list[Proof]:
        """Every proof that a run would try before its first step, and more rows compared; `objections` is empty."""
        _refuse_live(given)
        from training_hub.backends.jax_engine.session import check

        return check(recipe, given)

    def score(self, recipe: Recipe, console: Console, *, generates: bool) -> dict[str, float]:
        """How well the model of model.path does the rows of data.path."""
        from training_hub.backends.jax_engine.scoring import score

        return score(recipe, console, generates=generates)

    def examine(
        self, recipe: Recipe, given: Given, console: Console, own: Sequence[Callable[..., Any]] = ()
    ) -> Sitting:
        """What the model of model.path says to the rows, and its scores."""
        _refuse_live(given)
        from training_hub.backends.jax_engine.scoring import examine

        return examine(recipe, given, console, own)

    def voice(self, recipe: Recipe) -> Voice:
        """The model of model.path, to be talked to."""
        from training_hub.backends.jax_engine.scoring import open_voice

        return open_voice(recipe)

    def train(self, recipe: Recipe, given: Given) -> TrainResult:
        """Run the recipe to its end, going on from the newest whole checkpoint of its output folder.

        Raises BackendError where JAX is not installed, RecipeError for a live model, which is one of torch.
        """
        if absent := missing_packages():
            raise BackendError(absent)
        _refuse_live(given)
        from training_hub.backends.jax_engine.session import train

        return train(recipe, given)


def _refuse_live(given: Given) -> None:
    if given.model is not None:
        raise RecipeError(
            "model: a live model is one of torch, and backend: jax reads weights from a folder. Save it with "
            "save_pretrained and give that folder as model.path, or write backend: torch."
        )


def _model_problems(recipe: Recipe, *, with_weights: bool = True) -> list[str]:
    chosen = recipe.model
    if chosen.path.startswith("("):  # not a path: it stands for a model that is handed over
        return []
    found = folder_problems(chosen.path, with_weights=with_weights)
    if not found and not Path(chosen.path).expanduser().exists():
        problem = hub_problem(chosen.path, chosen.revision)
        found = [problem] if problem else []
    if found:
        return found
    config = read_config(chosen)
    return config_problems(config, chosen.path) or _of_experts(recipe, config)


def _of_experts(recipe: Recipe, config: Any) -> list[str]:
    """OSFT of experts cuts fused weights, which this engine does not have."""
    if find_algorithm(recipe.algorithm).adaptation != "osft" or not shape_of(config).experts:
        return []
    return [
        f"algorithm: osft; backend jax does not protect experts, which {recipe.model.path} has. Use backend: torch."
    ]
