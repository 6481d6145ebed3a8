"""What a run is made from, before any weight is loaded: tokenizer, template, token stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.backends import Given
from training_hub.backends.torch_engine.model import Limits, limits_of, read_limits
from training_hub.backends.torch_engine.teacher.facts import TeacherFacts, read_teacher
from training_hub.data.prepare import Prepared, prepare
from training_hub.data.questions import questions_of
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.evaluation.judging import metrics_of
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import rows_generated
from training_hub.types import Console

SAMPLES_FOR_STOP = 1000


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


def watched_rows(
    recipe: Recipe, tokenizer: ChatTokenizer, template: ChatTemplate | None, console: Console
) -> TokenStore:
    """The samples of evaluation.watch: all of its rows, in whatever format, tokenised as validation rows are."""
    own: dict[str, Any] = {"path": recipe.evaluation.watch, "format": "auto", "columns": {}, "validation": None}
    whole = {"validation_fraction": 0.0, "deduplicate": False, "max_rows": None}
    data = recipe.data.model_copy(update={**own, **whole})
    recipe = recipe.model_copy(update={"data": data})
    return prepare(recipe, tokenizer=tokenizer, template=template, console=console).train


def check_limits(store: TokenStore, limits: Limits, console: Console) -> None:
    """Raise DataError for token ids or lengths that the model has no weights for; say what it was not trained for."""
    problems = []
    largest = store.largest_id()
    if largest >= limits.vocabulary:
        problems.append(
            f"data: token id {largest} occurs, but the model has embeddings for {limits.vocabulary} tokens, 0 to "
            f"{limits.vocabulary - 1}. Use the tokenizer that belongs to the model, or add the tokens to it first."
        )
    longest = int(store.lengths.argmax())
    length = int(store.lengths[longest])
    if limits.positions is not None and length > limits.positions:
        line = f"{store.origin(longest)}: {length:,} tokens, but the model has {limits.positions:,} positions"
        remedy = f"training.max_seq_len: {limits.positions}"
        if limits.is_hard:
            problems.append(f"{line}. Write {remedy}.")
        else:
            console.say(f"data: {line}; it was not trained for more. {remedy} keeps within it")
    if problems:
        raise DataError(problems)


def stop_ids(materials: Materials) -> list[int]:
    """The ids at which the model stops: those it was known by, and the special token that ends most trained samples.

    A base model taught with <|im_end|> has learned to end there, whatever its own end-of-sequence token is.
    """
    store = materials.prepared.train
    ends: Counter[int] = Counter()
    for index in range(min(len(store), SAMPLES_FOR_STOP)):
        sample = store[index]
        ends[int(sample.ids[int(sample.weights.nonzero()[0][-1])])] += 1
    last, count = ends.most_common(1)[0]
    special = set(materials.tokenizer.special_ids.values())
    learned = {last} if last in special and 2 * count > ends.total() else set()
    return sorted(materials.tokenizer.stop_ids | learned)


def rows_kept_back(materials: Materials, most: int = 8) -> list[list[int]]:
    """Token ids of the first validation rows, on which two models can be compared; [] where there are none."""
    store = materials.prepared.validation
    return [] if store is None else [store[index].ids.tolist() for index in range(min(most, len(store)))]
