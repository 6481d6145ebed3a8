"""Packs hold every sample once, within the budget, and keep them apart."""

from __future__ import annotations

import numpy as np
import pytest

from training_hub.data.packing import assign, pack, pack_all
from training_hub.errors import DataError
from training_hub.types import Origin, Sample


def sample(*ids: int, weights: list[float] | None = None) -> Sample:
    array = np.array(ids, dtype=np.int32)
    chosen = np.ones(len(array), dtype=np.float32) if weights is None else np.array(weights, dtype=np.float32)
    return Sample(array, chosen, Origin("rows.jsonl", 1))


@pytest.mark.parametrize("seed", range(20))
def test_every_index_is_in_one_row_within_the_budget(seed):
    draw = np.random.default_rng(seed)
    budget = int(draw.integers(50, 400))
    lengths = draw.integers(1, budget + 1, size=int(draw.integers(1, 200))).tolist()
    rows = assign(lengths, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= budget


def test_best_fit_decreasing_fills_rows_that_first_come_would_not():
    # In the order given, 5 would join 4 and leave both 6 and 5 alone: three rows. Two are enough.
    assert assign([4, 5, 6, 5], 10) == [[2, 0], [1, 3]]


def one_by_one(lengths: list[int], budget: int) -> list[list[int]]:
    """Best fit decreasing as it is written in books: each sample into the fullest row that holds it."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(left, row) for row, left in enumerate(free) if left >= lengths[index]]
        if not fitting:
            rows.append([])
            free.append(budget)
            fitting = [(budget, len(rows) - 1)]
        row = min(fitting)[1]
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


@pytest.mark.parametrize("seed", range(50))
def test_placing_equal_lengths_together_gives_the_rows_of_placing_one_by_one(seed):
    draw = np.random.default_rng(seed)
    budget = int(draw.integers(5, 100))
    lengths = draw.integers(1, int(draw.integers(2, budget + 2)), size=int(draw.integers(0, 150))).tolist()
    assert assign(lengths, budget) == one_by_one(lengths, budget)


def test_many_chat_like_lengths_fill_their_rows_to_more_than_995_in_1000():
    lengths = np.random.default_rng(0).lognormal(5.6, 0.9, size=100_000).clip(4, 4096).astype(int)
    rows = assign(lengths.tolist(), 8192)
    assert max(int(lengths[row].sum()) for row in rows) <= 8192
    assert lengths.sum() / (len(rows) * 8192) > 0.995


def test_packing_real_lengths_leaves_less_than_two_percent_empty():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, size=2000).clip(1, 4096).astype(int).tolist()
    rows = assign(lengths, 4096)
    assert sum(lengths) / (len(rows) * 4096) > 0.98


def test_a_sample_longer_than_the_budget_is_an_error_with_both_numbers():
    with pytest.raises(DataError, match=r"11 tokens does not fit in a pack of 10"):
        assign([3, 11], 10)


def test_positions_restart_and_no_loss_crosses_a_border():
    made = pack([sample(1, 2, 3), sample(4, 5)], [7, 9])
    assert made.positions.tolist() == [0, 1, 2, 0, 1]
    assert made.boundaries.tolist() == [0, 3, 5]
    assert made.weights.tolist() == [0, 1, 1, 0, 1]
    assert made.samples.tolist() == [7, 9]


def test_without_packing_each_sample_is_its_own_row():
    samples = {3: sample(1, 2), 5: sample(3, 4, 5)}
    packs = pack_all([3, 5], samples.__getitem__, budget=100, is_packed=False)
    assert [one.ids.tolist() for one in packs] == [[1, 2], [3, 4, 5]]
