"""Long columns taken a stretch at a time, so that what is in memory does not grow with the number of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

# Values of a column that are looked at together: a few megabytes of each.
STRETCH = 1 << 19


def stretches(size: int) -> Iterator[slice]:
    """range(size) cut into slices."""
    for start in range(0, size, STRETCH):
        yield slice(start, min(start + STRETCH, size))


def counts(column: np.ndarray) -> Counter[int]:
    """How often each value occurs."""
    found: Counter[int] = Counter()
    for part in stretches(len(column)):
        values, times = np.unique(column[part], return_counts=True)
        found.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    return found


def smallest(column: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` smallest values stand, [count] int64: by value, and where these are equal by place."""
    return _first(column, count, 1)


def largest(column: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest values stand, [count] int64: by value downwards, and where these are equal by place."""
    return _first(column, count, -1)


def _first(column: np.ndarray, count: int, sign: int) -> np.ndarray:
    held = np.empty(0, np.int64)
    for part in stretches(len(column)):
        held = np.concatenate([held, np.arange(part.start, part.stop)])
        held = held[np.argsort(sign * column[held], kind="stable")[:count]]
    return held
