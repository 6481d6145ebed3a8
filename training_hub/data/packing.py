"""Samples laid end to end in rows of a bounded number of tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from training_hub.errors import DataError
from training_hub.types import Pack, Sample


def assign(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group the indices of `lengths` into rows of at most `budget` tokens, by best fit decreasing.

    Each index appears once; rows keep the order in which they were opened, so the result depends on `lengths` alone.
    Raises DataError for a length above `budget`. Source: Johnson et al. 1974, SIAM J. Comput. 3(4); for packing
    sequences Krell et al. 2021, arXiv:2107.02027.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > budget:
            raise DataError(f"a sample of {length} tokens does not fit in a pack of {budget} tokens")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([index])
            insort(room, (budget - length, len(rows) - 1))
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            insort(room, (free - length, row))
    return rows


def pack(samples: Sequence[Sample], indices: Sequence[int]) -> Pack:
    """One pack of `samples`, which stand at `indices` in their store.

    Positions restart at 0 for each sample, and the first token of each has weight 0, so no loss crosses a border.
    """
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    boundaries = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum(lengths, out=boundaries[1:])
    weights = np.concatenate([sample.weights for sample in samples]).astype(np.float32)
    weights[boundaries[:-1]] = 0.0
    return Pack(
        ids=np.concatenate([sample.ids for sample in samples]).astype(np.int32),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        weights=weights,
        boundaries=boundaries,
        samples=np.asarray(indices, dtype=np.int64),
    )


def pack_all(indices: Sequence[int], load: Callable[[int], Sample], budget: int, is_packed: bool = True) -> list[Pack]:
    """Packs of at most `budget` tokens that hold each of `indices` once; one sample a pack where not `is_packed`."""
    samples = [load(index) for index in indices]
    rows = assign([len(sample) for sample in samples], budget) if is_packed else [[i] for i in range(len(samples))]
    return [pack([samples[i] for i in row], [indices[i] for i in row]) for row in rows]
