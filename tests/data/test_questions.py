"""Rows as questions: cut before the last trained stretch, spread over the store, plain text refused."""

from __future__ import annotations

import numpy as np
import pytest

from training_hub.data.questions import Question, question, questions_of
from training_hub.data.store import TokenStore
from training_hub.errors import DataError
from training_hub.types import Origin, Sample


def store(count: int, weights: list[float]) -> TokenStore:
    ids = np.arange(len(weights), dtype=np.int32)
    rows = [Sample(ids, np.array(weights, np.float32), Origin("rows.jsonl", line)) for line in range(1, count + 1)]
    return TokenStore.from_samples(rows)


def test_a_row_is_asked_up_to_its_last_trained_stretch():
    ids, weights = np.arange(10, 20), np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], np.float32)
    assert question(ids, weights) == Question(prompt=[10, 11, 12, 13, 14, 15], answer=[16, 17, 18])
    assert question(ids, np.array([0] * 9 + [1])) == Question(prompt=list(range(10, 19)), answer=[19])


def test_fewer_rows_are_spread_over_the_store_and_always_the_same():
    found = [one.origin for one in questions_of(store(10, [0, 0, 1]), 4)]
    assert found == [f"rows.jsonl line {line}" for line in (1, 3, 6, 8)]
    assert len(questions_of(store(10, [0, 0, 1]), 99)) == len(questions_of(store(10, [0, 0, 1]))) == 10


def test_rows_that_ask_nothing_are_refused():
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: nothing in these rows asks"):
        questions_of(store(3, [0, 1, 1, 1]))
