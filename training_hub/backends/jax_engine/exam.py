"""How a model of this engine is asked what `shared.exam` compares and writes down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training_hub.backends.jax_engine.generate import Speech
from training_hub.backends.jax_engine.materials import Materials
from training_hub.backends.jax_engine.step import Tree
from training_hub.backends.shared import exam as shared
from training_hub.backends.shared.answers import Answer
from training_hub.backends.shared.exam import Exam, Examiner
from training_hub.data.store import TokenStore
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import rows_generated
from training_hub.types import Console


def ask(examiner: Examiner, speech: Speech, weights: tuple[Tree, Tree], console: Console, what: str) -> list[Answer]:
    """The answers to all questions of a model of these weights, what trains and what stays."""
    prompts = examiner.prompts(speech.limits)
    with console.progress(what, total=len(prompts), unit="answers") as advance:
        return speech.answers(weights, prompts, examiner.decoding, examiner.batch_tokens, advance)


def examiner_of(
    recipe: Recipe, materials: Materials, store: TokenStore, most: int | None, own: Sequence[Callable[..., Any]]
) -> Examiner:
    """The examiner for rows of `store`, all or `most` of them. own: metrics of the user's, as functions."""
    stops = materials.stop_ids
    return shared.examiner_of(recipe.evaluation, recipe.seed, materials.tokenizer, stops, store, most, own)


def exam_of(recipe: Recipe, materials: Materials) -> Exam | None:
    """The exam of a run, None where the recipe asks for none."""
    store = materials.prepared.validation
    if not recipe.evaluation.generate or store is None:
        return None
    most = rows_generated(recipe.evaluation)
    return Exam(examiner_of(recipe, materials, store, most, materials.metrics), Path(recipe.output))
