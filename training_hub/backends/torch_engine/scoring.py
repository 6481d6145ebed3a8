"""How well a saved model does rows: the loss on their trained tokens, and what it says to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from training_hub.backends import Given
from training_hub.backends.shared.exam import share_right
from training_hub.backends.torch_engine.exam import ask, examiner_of
from training_hub.backends.torch_engine.generate import answers
from training_hub.backends.torch_engine.materials import Materials, load_materials, stop_ids
from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy
from training_hub.backends.torch_engine.plan import feed_settings
from training_hub.backends.torch_engine.preflight import can_pack
from training_hub.backends.torch_engine.saved import load_saved
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.data.feed import validation_packs
from training_hub.evaluation.metrics import perplexity
from training_hub.evaluation.predictions import Sitting
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import rows_generated
from training_hub.types import Console


def score(recipe: Recipe, console: Console, *, generates: bool) -> dict[str, float]:
    """Scores of the model of model.path on the rows of data.path: `loss`, `rows`, and `exact_match` where it generates.

    loss: the mean over all trained tokens, in nats. exact_match: the share of rows whose greedily generated answer is
    the reference's, letter by letter but for white space around it, and ends where it does.
    """
    materials = load_materials(recipe, Given(), console)
    model = load_saved(recipe)
    found = {"rows": float(len(materials.prepared.train)), "loss": _mean_loss(recipe, model, materials, console)}
    if generates:
        found["exact_match"] = share_right(
            materials.prepared.train,
            stop_ids(materials),
            materials.tokenizer,
            lambda prompts, decoding, advance: answers(model, prompts, decoding, advance=advance),
            console,
        )
    return found


def examine(recipe: Recipe, given: Given, console: Console, own: Sequence[Callable[..., Any]] = ()) -> Sitting:
    """What the model of model.path says to the rows of data.path, or that of `given` to its rows, and its scores: also
    `loss`, `perplexity` and `rows`.

    recipe.evaluation says by what answers are compared and how they are made; where `generate` is false none are. own:
    metrics of the user's, as functions. Raises DataError for rows that ask nothing, before a weight is loaded.
    """
    asked = recipe.evaluation
    materials = load_materials(recipe, given, console)
    store = materials.prepared.train
    most = None if asked.generate is True else rows_generated(asked)
    examiner = examiner_of(asked, recipe.seed, materials, store, most, own) if asked.generate else None
    model = load_saved(recipe, given.model)
    loss = _mean_loss(recipe, model, materials, console)
    scores = {"rows": float(len(store)), "loss": loss, "perplexity": perplexity(loss)}
    if examiner is None:
        return Sitting((), scores)
    sitting = examiner.judge(ask(examiner, model, console, f"answering: {recipe.model.path}"))
    return Sitting(sitting.predictions, {**scores, "rows": float(len(sitting.predictions)), **sitting.scores})


@torch.no_grad()
def _mean_loss(recipe: Recipe, model: Any, materials: Materials, console: Console) -> float:
    store, device = materials.prepared.train, next(model.parameters()).device
    objective, _ = cross_entropy(model)
    is_packed = recipe.data.packing and can_pack(model, objective, model.dtype, console)
    settings = feed_settings(recipe, int(store.lengths.max()), device, is_packed)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with console.progress(f"loss: {recipe.model.path}", total=int(store.lengths.sum()), unit="tokens") as advance:
        for one in validation_packs(store, settings.token_budget, settings.is_packed):
            total += objective(model, to_device(one, device)).total
            advance(len(one))
    return float(total) / float(store.trained_weight.sum())
