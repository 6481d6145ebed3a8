"""What is learned: each objective makes a weighted sum of losses from a model and a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training_hub.algorithms import objective_of
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy, as_asked
from training_hub.backends.torch_engine.objectives.noise import Noisy
from training_hub.backends.torch_engine.tensors import PackTensors, Term
from training_hub.recipe import Recipe

Objective = Callable[[Any, PackTensors], Term]

OBJECTIVES: dict[str, Callable[[CrossEntropy, Recipe], Objective]] = {"cross_entropy": as_asked}
"""By name: what makes the objective from the model's plain cross-entropy, which knows how to run it, and the recipe."""


def make_objective(recipe: Recipe, plain: CrossEntropy) -> Objective:
    """What a run of `recipe` minimises, of a model whose plain cross-entropy is `plain`."""
    objective = OBJECTIVES[objective_of(recipe)](plain, recipe)
    alpha = recipe.loss.neftune_noise_alpha
    return Noisy(objective, alpha) if alpha else objective
