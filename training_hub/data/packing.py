"""Samples laid end to end in rows of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from training_hub.errors import DataError
from training_hub.types import Pack, Sample


def assign(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group the indices of `lengths` into rows of at most `budget` tokens, by best fit decreasing.

    Each index appears once; rows keep the order in which they were opened, so the result depends on `lengths` alone.
    Samples of one length are placed together, so that the time grows with the number of different lengths.
    Raises DataError for a length above `budget`. Source: Johnson et al. 1974, SIAM J. Comput. 3(4); for packing
    sequences Krell et al. 2021, arXiv:2107.02027.
    """
    of_index = np.asarray(lengths, dtype=np.int64)
    if len(of_index) == 0:
        return []
    order = np.argsort(-of_index, kind="stable")
    sizes, starts = np.unique(-of_index[order], return_index=True)
    if -sizes[0] > budget:
        raise DataError(f"a sample of {-sizes[0]} tokens does not fit in a pack of {budget} tokens")
    shelf = _Shelf(budget)
    counts = np.diff(np.append(starts, len(order)))
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        shelf.place(-size, count)
    row_of = np.array(shelf.row_of)
    by_row = order[np.argsort(row_of, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(row_of)).tolist()
    return [by_row[start:end] for start, end in pairwise([0, *ends])]


class _Shelf:
    """Rows by their free tokens. `row_of` is the row of each sample placed so far."""

    def __init__(self, budget: int):
        self.row_of: list[int] = []
        self._budget = budget
        self._num_rows = 0
        self._rows: dict[int, list[int]] = {}  # by free tokens: row numbers, ascending
        self._free = 0  # bit f is set where rows have f free tokens

    def place(self, length: int, count: int) -> None:
        """Place so many samples of `length`: each where it leaves least free, in the first of equal rows."""
        while count:
            fitting = self._free >> length
            free = length + (fitting & -fitting).bit_length() - 1 if fitting else self._budget
            # What a row has left is less than any other has that still holds the length: it takes the next one, too.
            each = min(free // length, count) if length else count
            rows = self._taken(free, count // each) if fitting else self._opened(count // each)
            self.row_of += rows if each == 1 else [row for row in rows for _ in range(each)]
            count -= each * len(rows)
            self._put(free - each * length, rows)

    def _opened(self, count: int) -> list[int]:
        first, self._num_rows = self._num_rows, self._num_rows + count
        return list(range(first, self._num_rows))

    def _taken(self, free: int, most: int) -> list[int]:
        rows = self._rows.pop(free)
        if len(rows) > most:
            self._rows[free] = rows[most:]
        else:
            self._free ^= 1 << free
        return rows[:most]

    def _put(self, free: int, rows: list[int]) -> None:
        there = self._rows.get(free)
        self._rows[free] = sorted(there + rows) if there else rows
        self._free |= 1 << free


def pack(samples: Sequence[Sample], indices: Sequence[int]) -> Pack:
    """One pack of `samples`, which stand at `indices` in their store.

    Positions restart at 0 for each sample, and the first token of each has weight 0, so no loss crosses a border.
    """
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    boundaries = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum(lengths, out=boundaries[1:])
    weights = np.concatenate([sample.weights for sample in samples], dtype=np.float32)
    weights[boundaries[:-1]] = 0.0
    return Pack(
        ids=np.concatenate([sample.ids for sample in samples], dtype=np.int32),
        positions=np.arange(boundaries[-1], dtype=np.int32) - np.repeat(boundaries[:-1], lengths),
        weights=weights,
        boundaries=boundaries,
        samples=np.asarray(indices, dtype=np.int64),
    )


def pack_all(indices: Sequence[int], load: Callable[[int], Sample], budget: int, is_packed: bool = True) -> list[Pack]:
    """Packs of at most `budget` tokens that hold each of `indices` once; one sample a pack where not `is_packed`."""
    samples = [load(index) for index in indices]
    rows = assign([len(sample) for sample in samples], budget) if is_packed else [[i] for i in range(len(samples))]
    return [pack([samples[i] for i in row], [indices[i] for i in row]) for row in rows]
