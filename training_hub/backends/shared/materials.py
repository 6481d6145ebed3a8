"""Rows and tokenizer against the model, before any weight is loaded: what fits, what ends text, what is watched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from training_hub.data.prepare import prepare
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.recipe import Recipe
from training_hub.types import Console

SAMPLES_FOR_STOP = 1000


@dataclass(frozen=True)
class Limits:
    """What a model's config says it can read: token ids below `vocabulary`, and `positions` tokens (None: no end).

    is_hard: beyond `positions` there is no embedding; else (rotary positions) only nothing that was trained.
    """

    vocabulary: int
    positions: int | None
    is_hard: bool


def limits_of(config: Any) -> Limits:
    """The limits that a transformers config states."""
    text = config.get_text_config()
    is_rotary = any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    return Limits(text.vocab_size, getattr(text, "max_position_embeddings", None), not is_rotary)


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


def stop_ids(tokenizer: ChatTokenizer, store: TokenStore) -> list[int]:
    """The ids at which the model stops: those it was known by, and the special token that ends most trained samples.

    A base model taught with <|im_end|> has learned to end there, whatever its own end-of-sequence token is.
    """
    ends: Counter[int] = Counter()
    for index in range(min(len(store), SAMPLES_FOR_STOP)):
        sample = store[index]
        ends[int(sample.ids[int(sample.weights.nonzero()[0][-1])])] += 1
    last, count = ends.most_common(1)[0]
    special = set(tokenizer.special_ids.values())
    learned = {last} if last in special and 2 * count > ends.total() else set()
    return sorted(tokenizer.stop_ids | learned)
