"""What a run is made from, before any weight is loaded: tokenizer, template, token stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.backends import Given
from training_hub.backends.shared import materials as shared
from training_hub.backends.shared.materials import check_limits, limits_of, watched_rows
from training_hub.backends.torch_engine.attention_trial import TIMED_TOKENS
from training_hub.backends.torch_engine.loading.model_config import read_limits
from training_hub.backends.torch_engine.teacher.facts import TeacherFacts, read_teacher
from training_hub.data.prepare import Prepared, prepare
from training_hub.data.questions import questions_of
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.evaluation.judging import metrics_of
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import rows_generated
from training_hub.types import Console


@dataclass(frozen=True)
class Materials:
    """What a run is made from, before any weight is loaded. metrics: functions that were handed over."""

    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    prepared: Prepared
    watch: TokenStore | None = None
    metrics: tuple[Callable[..., Any], ...] = ()
    teacher: TeacherFacts | None = None


def load_materials(recipe: Recipe, given: Given, console: Console, rejects: Path | None = None) -> Materials:
    """Tokenizer, template, token stores and the teacher's facts. Every problem of the data, and of what teacher and
    model have in common, is raised here, before weights are loaded.

    Rows that are left out are listed in the file `rejects`.
    """
    if given.tokenizer is not None:
        tokenizer = ChatTokenizer.wrap(given.tokenizer)
    else:
        path = recipe.model.tokenizer or recipe.model.path
        tokenizer = ChatTokenizer.load(
            path, trust_remote_code=recipe.model.trust_remote_code, revision=recipe.model.revision
        )
    template = resolve_template(recipe.data.chat_template, tokenizer)
    prepared = prepare(
        recipe,
        tokenizer=tokenizer,
        template=template,
        console=console,
        rows=given.rows,
        validation_rows=given.validation_rows,
        rejects=rejects,
    )
    if recipe.evaluation.generate and prepared.validation is not None:
        questions_of(prepared.validation, rows_generated(recipe.evaluation))  # refuses rows that ask nothing
        metrics_of(recipe.evaluation.metrics, given.metrics)  # refuses functions that are not there
    watch = watched_rows(recipe, tokenizer, template, console) if recipe.evaluation.watch else None
    limits = read_limits(recipe.model) if given.model is None else limits_of(given.model.config)
    for store in (prepared.train, prepared.validation, watch):
        if store is not None:
            check_limits(store, limits, console)
    teacher = read_teacher(recipe, given, tokenizer, template, prepared.train, limits.vocabulary, console)
    return Materials(tokenizer, template, prepared, watch, tuple(given.metrics), teacher)


def stop_ids(materials: Materials) -> list[int]:
    """The ids at which the model stops."""
    return shared.stop_ids(materials.tokenizer, materials.prepared.train)


def rows_kept_back(materials: Materials, most: int = 8) -> list[list[int]]:
    """Token ids of the first validation rows, on which two models can be compared; [] where there are none."""
    store = materials.prepared.validation
    return [] if store is None else [store[index].ids.tolist() for index in range(min(most, len(store)))]


def first_lengths(materials: Materials) -> list[int]:
    """Tokens of the first rows, as many as attention is tried on."""
    lengths: list[int] = materials.prepared.train.lengths[:TIMED_TOKENS].tolist()
    return lengths
