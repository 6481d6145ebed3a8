"""Which samples of a store belong to one row, and which rows say what an earlier one said."""

from __future__ import annotations

import numpy as np

from training_hub.data.columns import stretches

# Samples whose hashes are compared with each other at a time; a column is gone through once for each so many.
COMPARED = 1 << 20


def mark_rows(
    lines: np.ndarray, parts: np.ndarray, hashes: np.ndarray, begins: np.ndarray, repeats: np.ndarray
) -> None:
    """Write [n] uint8: into `begins` 1 where a row begins, into `repeats` 1 where an earlier row has the same content.

    Neighbouring samples of the same line [n] and part [n] are one row; `hashes` [n, 2] are of the row's content.
    """
    for part in stretches(len(lines)):
        first = max(part.start, 1)
        here, before = slice(first, part.stop), slice(first - 1, part.stop - 1)
        begins[here] = (lines[here] != lines[before]) | (parts[here] != parts[before])
    begins[:1] = 1
    rounds = len(lines) // COMPARED + 1
    for number in range(rounds):
        repeats[_repeats(hashes, begins, number, rounds)] = 1
    _spread(begins, repeats)


def _repeats(hashes: np.ndarray, begins: np.ndarray, number: int, rounds: int) -> np.ndarray:
    """The first samples of the rows that repeat an earlier one, among the hashes of remainder `number`."""
    found = [np.empty(0, np.int64)]
    for part in stretches(len(begins)):
        is_mine = (hashes[part, 0] % np.uint64(rounds) == number) & (begins[part] == 1)
        found.append(part.start + np.flatnonzero(is_mine))
    rows = np.concatenate(found)
    mine = hashes[rows]
    order = np.lexsort((mine[:, 1], mine[:, 0]))  # stable, so that the first of equal rows comes first
    in_order = mine[order]
    return rows[order[1:][(in_order[1:] == in_order[:-1]).all(axis=1)]]


def _spread(begins: np.ndarray, repeats: np.ndarray) -> None:
    """Give every sample of a row what its first one has."""
    last = np.uint8(0)
    for part in stretches(len(begins)):
        starts = np.flatnonzero(begins[part])
        row = np.searchsorted(starts, np.arange(part.stop - part.start), side="right")
        of_rows = np.concatenate([np.array([last]), repeats[part][starts]])
        repeats[part] = of_rows[row]
        last = of_rows[-1]
