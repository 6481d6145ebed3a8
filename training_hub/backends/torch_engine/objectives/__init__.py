"""What is learned: each objective makes a weighted sum of losses from a model and a pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from training_hub.algorithms import objective_of
from training_hub.backends.torch_engine.objectives.cross_entropy import (
    CrossEntropy,
    as_asked,
    losses_of_logits,
    model_logits,
)
from training_hub.backends.torch_engine.objectives.distillation import Distillation, Teaching, from_teacher
from training_hub.backends.torch_engine.objectives.noise import Noisy
from training_hub.backends.torch_engine.objectives.token_loss import TokenLoss
from training_hub.backends.torch_engine.tensors import PackTensors, Term
from training_hub.recipe import Recipe

Objective = Callable[[Any, PackTensors], Term]

OBJECTIVES: dict[str, Callable[[CrossEntropy, Recipe, Teaching | None], Objective]] = {
    "cross_entropy": as_asked,
    "distillation": from_teacher,
}
"""By name: what makes the objective from the model's plain cross-entropy, which knows how to run it, the recipe, and
where the word of its teacher comes from, if it has one."""


def make_objective(recipe: Recipe, plain: CrossEntropy, teaching: Teaching | None = None) -> Objective:
    """What a run of `recipe` minimises, of a model whose plain cross-entropy is `plain`."""
    objective = OBJECTIVES[objective_of(recipe)](plain, recipe, teaching)
    alpha = recipe.loss.neftune_noise_alpha
    return Noisy(objective, alpha) if alpha else objective


def on_excerpts(objective: Any) -> Any:
    """The objective for packs that are made up of pieces of samples, of which nothing is kept by number."""
    if isinstance(objective, Noisy):
        return replace(objective, objective=on_excerpts(objective.objective))
    if isinstance(objective, Distillation):
        return replace(objective, teaching=objective.teaching.on_excerpts())
    return objective


def plain_total(objective: Any, recipe: Recipe, model: Any, pack: PackTensors) -> Tensor:
    """What the objective should give, from the model's whole logits and by operators that autograd differentiates."""
    inner = objective.objective if isinstance(objective, Noisy) else objective
    if isinstance(inner, Distillation):
        return inner.plain_losses(model, pack).sum()
    return losses_of_logits(model_logits(model, pack), pack, TokenLoss.of(recipe.loss)).sum()
