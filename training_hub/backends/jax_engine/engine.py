"""The jax engine as a backend: what it refuses, and where it begins. JAX itself is loaded by `train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """Trains with JAX on whatever devices it finds: CPUs, GPUs, TPUs; in this process alone or with others that were
    started with it."""

    name = "jax"

    def num_devices(self) -> int:
        """Processes of a node: one, which has all its devices."""
        return 1

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
        problems += _of_processes(recipe)
        if problems:
            raise RecipeError(problems)
        from training_hub.backends.jax_engine.planner import plan

        return plan(recipe, console, measures=measures)

    def check(self, recipe: Recipe, given: Given) -> list[Proof]:
        """Every proof that a run would try before its first step, and more rows compared; `objections` is empty."""
        _refuse_live(given)
        if problems := _of_processes(recipe):
            raise RecipeError(problems)
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

    def examine_together(
        self, recipes: Sequence[Recipe], given: Given, console: Console, own: Sequence[Callable[..., Any]] = ()
    ) -> list[Sitting]:
        """The same of several models, by all processes that were started with this one, in each of them."""
        _refuse_live(given)
        from training_hub.backends.jax_engine.scoring import examine_together

        return examine_together(recipes, given, console, own)

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


def _of_processes(recipe: Recipe) -> list[str]:
    """Why what is asked of one process cannot be said of several: it does not know their devices."""
    asked = recipe.processes
    if (asked.procs, asked.nodes) in ((1, 1), ("auto", 1), ("gpu", 1)):
        return []
    return [
        f"processes: found {asked.procs} on each of {asked.nodes} nodes; backend jax does this for the devices of one "
        "process. Leave processes out, and write degrees of parallelism for the devices that are here."
    ]


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
    return config_problems(config, chosen.path) or list(_of_experts(recipe, shape_of(config).experts))


def _of_experts(recipe: Recipe, experts: int) -> Iterator[str]:
    """What cannot be done with so many experts. OSFT of experts cuts fused weights, which this engine does not have."""
    if experts and find_algorithm(recipe.algorithm).adaptation == "osft":
        yield (
            f"algorithm: osft; backend jax does not protect experts, which {recipe.model.path} has. Use backend: torch."
        )
    degree = recipe.parallelism.expert_parallel_degree
    if degree > 1 and (not experts or experts % degree):
        allowed = [number for number in range(1, experts + 1) if experts % number == 0]
        yield (
            f"parallelism.expert_parallel_degree: {degree}, but {recipe.model.path} has {experts or 'no'} experts. "
            f"Write {' or '.join(map(str, allowed)) or 1}."
        )
