"""Rows as questions: what stands before the last trained stretch of a row, token by token, and that stretch.

So any row format and any chat template can be asked, and nothing is asked otherwise than it is taught.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training_hub.data.store import TokenStore
from training_hub.errors import DataError


@dataclass(frozen=True)
class Question:
    """Token ids of what is asked and of the answer wanted, which may end with a token that ends the turn.

    origin: where the row stands.
    """

    prompt: list[int]
    answer: list[int]
    origin: str = ""


def question(ids: np.ndarray, weights: np.ndarray, origin: str = "") -> Question:
    """A row as it is asked: `ids` [T] and `weights` [T], cut before the last stretch of trained tokens."""
    trained = np.flatnonzero(weights)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
    return Question(ids[:start].tolist(), ids[start : int(trained[-1]) + 1].tolist(), origin)


def questions_of(store: TokenStore, most: int | None = None) -> list[Question]:
    """The rows as they are asked; `most` of them, spread evenly over the store, where there are more.

    Raises DataError where the rows ask nothing: plain text, of which every token is trained.
    """
    count = len(store) if most is None else min(most, len(store))
    chosen = [index * len(store) // count for index in range(count)]
    found = [question(store[index].ids, store[index].weights, str(store.origin(index))) for index in chosen]
    if all(len(one.prompt) <= 1 for one in found):
        raise DataError(
            f"{found[0].origin}: nothing in these rows asks for an answer: every token is trained. To generate, give "
            "rows with messages or with prompt and completion, or set evaluation.generate to false."
        )
    return found
