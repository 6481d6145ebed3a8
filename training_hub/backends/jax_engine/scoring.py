"""Saved models: how well they do rows, and what they say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training_hub.backends import Given
from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.batches import Sizes
from training_hub.backends.jax_engine.beforehand import numbers_of
from training_hub.backends.jax_engine.build import Machine, attention_of, build_of, keep_programs, machine_of
from training_hub.backends.jax_engine.exam import ask, examiner_of
from training_hub.backends.jax_engine.forward import Forward
from training_hub.backends.jax_engine.full import Adaptation, Full
from training_hub.backends.jax_engine.generate import Speech
from training_hub.backends.jax_engine.loop import Tree, evaluate
from training_hub.backends.jax_engine.lora import LowRank
from training_hub.backends.jax_engine.materials import Materials, load_materials
from training_hub.backends.jax_engine.mesh import Mesh, mesh_of
from training_hub.backends.jax_engine.objective import PLAIN
from training_hub.backends.jax_engine.processes import ALONE, Group, joined, refuse_differences
from training_hub.backends.jax_engine.session import feed_of
from training_hub.backends.jax_engine.shapes import Shape, folder_of, read_config, shape_of
from training_hub.backends.jax_engine.step import Steps
from training_hub.backends.shared import voice
from training_hub.backends.shared.answers import Advance, Answer, Decoding, Prompt
from training_hub.backends.shared.exam import share_right
from training_hub.backends.shared.materials import Limits, limits_of
from training_hub.backends.shared.voice import Stream, Voice
from training_hub.data.feed import Feed
from training_hub.evaluation.metrics import perplexity
from training_hub.evaluation.predictions import Sitting, read_sitting, sitting_as_json
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import rows_generated
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


def score(recipe: Recipe, console: Console, *, generates: bool) -> dict[str, float]:
    """Scores of the model of model.path on the rows of data.path: `loss`, the mean over all trained tokens in nats,
    `rows`, and where it generates `exact_match`, the share of rows answered as the row says."""
    materials = load_materials(recipe, Given(), console)
    saved, store = load_saved(recipe, materials, console), materials.prepared.train
    found = {"rows": float(len(store)), "loss": mean_loss(saved, materials)}
    if generates:
        speech = Speech(saved.steps.forward, limits_of(materials.config), lay=saved.mesh.lay)

        def answer(prompts: Sequence[Prompt], decoding: Decoding, advance: Advance) -> list[Answer]:
            return speech.answers((saved.trained, saved.frozen), prompts, decoding, advance=advance)

        found["exact_match"] = share_right(store, materials.stop_ids, materials.tokenizer, answer, console)
    return found


def examine(
    recipe: Recipe, given: Given, console: Console, own: Sequence[Callable[..., Any]] = (), group: Group = ALONE
) -> Sitting:
    """What the model of model.path says to the rows of data.path, or of `given`, and its scores: also `loss`,
    `perplexity` and `rows`.

    recipe.evaluation says by what answers are compared and how they are made; where `generate` is false none are. own:
    metrics of the user's, as functions. group: processes over whose devices model and rows lie, all of which must call
    it and find the same. Raises DataError for rows that ask nothing, before a weight is loaded.
    """
    asked = recipe.evaluation
    materials = group.main_first("reading data", lambda: load_materials(recipe, given, console))
    refuse_differences(group, numbers_of(materials))
    store = materials.prepared.train
    most = None if asked.generate is True else rows_generated(asked)
    examiner = examiner_of(recipe, materials, store, most, own) if asked.generate else None
    saved = load_saved(recipe, materials, console)
    loss = mean_loss(saved, materials)
    scores = {"rows": float(len(store)), "loss": loss, "perplexity": perplexity(loss)}
    if examiner is None:
        return Sitting((), scores)
    speech = Speech(saved.steps.forward, limits_of(materials.config), lay=saved.mesh.lay)
    what = f"answering: {recipe.model.path}"
    said = ask(examiner, speech, (saved.trained, saved.frozen), console, what)
    sitting = read_sitting(group.on_main("what answers are worth", lambda: sitting_as_json(examiner.judge(said))))
    return Sitting(sitting.predictions, {**scores, "rows": float(len(sitting.predictions)), **sitting.scores})


def examine_together(
    recipes: Sequence[Recipe], given: Given, console: Console, own: Sequence[Callable[..., Any]] = ()
) -> list[Sitting]:
    """The same of several recipes that differ in the model alone, by all processes that were started with this one, in
    each of them; the first speaks."""
    with joined(recipes[0].comm) as group, group.kept("weights of the others"):
        heard = console if group.is_main else open_console("off")
        return [examine(one, given, heard, own, group) for one in recipes]


def mean_loss(saved: Saved, materials: Materials) -> float:
    """Mean cross-entropy over the trained tokens of all rows, in nats."""
    return evaluate(saved, materials.prepared.train, f"loss: {saved.recipe.model.path}")


def load_saved(recipe: Recipe, materials: Materials, console: Console) -> Saved:
    """The model of model.path on the devices, in the format that a run of it would choose, with the adapter of
    lora.adapter where there is one."""
    machine = machine_of(recipe)
    forward, mesh, trained, frozen = _load(
        recipe, machine, materials.shape, materials.source, materials.longest, console
    )
    feed = feed_of(recipe, materials, machine)
    sizes = Sizes.of(max(feed.settings.token_budget, materials.longest), parts=mesh.parts)
    steps = Steps(forward, PLAIN, mesh)
    return Saved(recipe, steps, trained, frozen, feed, sizes, mesh, console, recipe.data.packing)


def open_voice(recipe: Recipe) -> Voice:
    """The model of model.path with its tokenizer and the template of data.chat_template, or its own.

    Raises RecipeError or DataError naming what is wrong with it.
    """

    def load() -> tuple[Stream, Limits]:
        console, config = open_console(recipe.monitoring.console, sys.stderr), read_config(recipe.model)
        shape, source = shape_of(config), folder_of(recipe.model)
        forward, mesh, trained, frozen = _load(recipe, machine_of(recipe), shape, source, 1, console)
        limits = limits_of(config)
        return partial(_stream, Speech(forward, limits, lay=mesh.lay), (trained, frozen)), limits

    return voice.open_voice(recipe, load)


def _stream(
    speech: Speech, weights: tuple[Tree, Tree], prompt: Prompt, decoding: Decoding, hear: Callable[[int], None]
) -> Answer:
    def heard(tokens_B: np.ndarray, goes_on_B: np.ndarray) -> None:
        if goes_on_B[0]:
            hear(int(tokens_B[0]))

    return speech.together(weights, [prompt], decoding, [0], heard)[0]


def _load(
    recipe: Recipe, machine: Machine, shape: Shape, source: Path, longest: int, console: Console
) -> tuple[Forward, Mesh, Tree, Tree]:
    """The forward pass over samples of up to `longest` tokens, the devices, and on them what trains and what stays."""
    keep_programs(recipe)
    adaptation: Adaptation = Full(shape, source)
    if recipe.lora.adapter is not None:
        adaptation = LowRank(recipe, shape, machine.dtype)
    mesh = mesh_of(recipe.parallelism, shape)
    loaded = files.load(source, shape, console)
    for line in loaded.notes:
        console.say(f"model: {line}")
    trained, frozen = (mesh.place(_lowered(half, machine.dtype)) for half in adaptation.split(loaded.weights))
    build = build_of(shape, attention_of(shape, machine, longest, mesh), machine, mesh, adaptation)
    return Forward(build, "none", machine.is_scanned("none")), mesh, trained, frozen


def _lowered(weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Matrices in the format that is computed in, in which they are multiplied anyway."""
    wanted = files.number_format(dtype)
    return {name: weight.astype(wanted) if weight.ndim > 1 else weight for name, weight in weights.items()}
