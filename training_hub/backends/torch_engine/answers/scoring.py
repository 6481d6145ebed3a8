"""How well a saved model does rows: the loss on their trained tokens, and what it says to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training_hub.backends import Given, OwnMetrics
from training_hub.backends.shared.exam import share_right
from training_hub.backends.torch_engine.answers.exam import ask, examiner_of
from training_hub.backends.torch_engine.answers.generate import answers
from training_hub.backends.torch_engine.as_forward import device_of, dtype_of
from training_hub.backends.torch_engine.layouts import WHOLE, Layout, layout_of
from training_hub.backends.torch_engine.loading.model import choose_device
from training_hub.backends.torch_engine.loading.saved import load_saved, load_saved_together
from training_hub.backends.torch_engine.materials import Materials, first_lengths, load_materials, stop_ids
from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy
from training_hub.backends.torch_engine.parallel import joined
from training_hub.backends.torch_engine.planning.plan import feed_settings
from training_hub.backends.torch_engine.preflight import can_pack
from training_hub.backends.torch_engine.together import refuse_other_data
from training_hub.data.feed import validation_packs
from training_hub.data.packing import pack
from training_hub.evaluation.metrics import perplexity
from training_hub.evaluation.predictions import Sitting, read_sitting, sitting_as_json
from training_hub.monitoring.console import open_console
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
    loss = _mean_loss(recipe, model, materials, console, WHOLE)
    found = {"rows": float(len(materials.prepared.train)), "loss": loss}
    if generates:
        found["exact_match"] = share_right(
            materials.prepared.train,
            stop_ids(materials),
            materials.tokenizer,
            lambda prompts, decoding, advance: answers(model, prompts, decoding, advance=advance),
            console,
        )
    return found


def examine(
    recipe: Recipe,
    given: Given,
    console: Console,
    own: OwnMetrics = (),
    layout: Layout = WHOLE,
) -> Sitting:
    """What the model of model.path says to the rows of data.path, or that of `given` to its rows, and its scores: also
    `loss`, `perplexity` and `rows`.

    recipe.evaluation says by what answers are compared and how they are made; where `generate` is false none are. own:
    metrics of the user's, as functions. layout: how model and rows lie over processes, all of which must call it and
    find the same. Raises DataError for rows that ask nothing, before a weight is loaded.
    """
    asked, group = recipe.evaluation, layout.group
    materials = group.main_first("reading data", lambda: load_materials(recipe, given, console))
    refuse_other_data(group, materials)
    store = materials.prepared.train
    most = None if asked.generate is True else rows_generated(asked)
    examiner = examiner_of(asked, recipe.seed, materials, store, most, own) if asked.generate else None
    model, layout = load_saved_together(layout, recipe, given.model, first_lengths(materials), console)
    loss = _mean_loss(recipe, model, materials, console, layout)
    scores = {"rows": float(len(store)), "loss": loss, "perplexity": perplexity(loss)}
    if examiner is None:
        return Sitting((), scores)
    said = ask(examiner, model, console, f"answering: {recipe.model.path}", layout)
    sitting = read_sitting(group.on_main("what answers are worth", lambda: sitting_as_json(examiner.judge(said))))
    return Sitting(sitting.predictions, {**scores, "rows": float(len(sitting.predictions)), **sitting.scores})


def examine_together(recipes: Sequence[Recipe], given: Given, console: Console, own: OwnMetrics = ()) -> list[Sitting]:
    """The same of several recipes that differ in the model alone, by all processes that were started with this one, in
    each of them; the first speaks."""
    with joined(recipes[0].comm) as group, group.kept("weights of the others"):
        layout = layout_of(recipes[0].parallelism, group, choose_device())
        heard = console if group.is_main else open_console("off")
        return [examine(one, given, heard, own, layout) for one in recipes]


@torch.no_grad()
def _mean_loss(recipe: Recipe, model: Any, materials: Materials, console: Console, layout: Layout) -> float:
    store, device, dtype = materials.prepared.train, device_of(model), dtype_of(model)
    objective, _ = cross_entropy(model, is_split=not recipe.parallelism.disable_loss_parallel)
    layout.refuse_other_numbers(model, objective, dtype)
    is_packed = recipe.data.packing and can_pack(model, objective, dtype, console)
    spare = pack([store[store.shortest]], [store.shortest])
    settings = feed_settings(recipe, int(store.lengths.max()), device, is_packed)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with console.progress(f"loss: {recipe.model.path}", total=int(store.lengths.sum()), unit="tokens") as advance:
        packs = validation_packs(store, settings.token_budget, settings.is_packed)
        for done, tokens in layout.ask(model, objective, packs, lambda: spare):
            for _, _, term in done:
                total += term.total
            advance(tokens)
    return float(layout.sum(total)) / float(store.trained_weight.sum())
