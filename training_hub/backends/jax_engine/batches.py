"""Packs as arrays of few sizes, so that a step is compiled few times.

A pack is padded to the next of a few lengths; padding is a document of its own that nothing sees and nothing trains.
"""

# B packs side by side, T tokens of the longest of them, padded, S parts into which the tokens of each are divided

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_hub.backends.jax_engine.attention import BLOCK
from training_hub.backends.jax_engine.noise import Noise
from training_hub.errors import DataError
from training_hub.types import Pack

CHUNK = 256
"""Trained positions whose logits exist at once."""


@dataclass(frozen=True)
class Arrays:
    """Packs side by side, as numpy; registered as a tree of arrays by `objective`.

    ids, positions, segments [B, T] int32: positions restart in each document; segments number documents from 1, padding
    is 0. rows [B S, T / S] int32: the positions within each part whose next token is trained, then zeros; targets int32
    and weights float32, of the same shape: those next tokens and their weights, then zeros. chunks []: how many chunks
    of rows are not padding. noise: what is drawn at random in training; without it nothing is.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    chunks: np.ndarray
    noise: Noise | None = None


@dataclass(frozen=True)
class Sizes:
    """The lengths to which packs are padded, ascending: the budget, three quarters of it, and both halved thrice.

    Eight at most, in whole chunks, which bounds how many programs a run compiles and holds; and of the places of a pack
    that is not very short a third is padding at most. The length depends on the pack alone, so that a run that goes on
    computes the same bits. parts: into which the tokens of a pack are divided, each of whole chunks.
    """

    lengths: tuple[int, ...]
    parts: int = 1

    @staticmethod
    def of(longest: int, halvings: int = 3, parts: int = 1) -> Sizes:
        """Lengths for packs of at most `longest` tokens."""
        halves = [longest >> times for times in range(halvings + 1)]
        wanted = {_whole(length, CHUNK * parts) for half in halves for length in (half, 3 * half // 4)}
        return Sizes(tuple(sorted(wanted)), parts)

    def length(self, tokens: int) -> int:
        return next(length for length in self.lengths if length >= tokens)

    def padded_fraction(self, packs: Sequence[Pack], rows: int) -> float:
        """The share of padding among all places that packs, so many of them side by side, take."""
        lengths = [len(pack) for pack in packs]
        sides = [max(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
        return 1 - sum(lengths) / (rows * sum(self.length(side) for side in sides))


def _whole(tokens: int, unit: int) -> int:
    return -(-max(tokens, 1) // unit) * unit


assert CHUNK % BLOCK == 0


def side_by_side(packs: Sequence[Pack], sizes: Sizes, count: int | None = None) -> Arrays:
    """Packs as the rows of arrays of one size; rows beyond them, up to `count`, are padding.

    Raises DataError where the first token of a document has a weight: nothing predicts it.
    """
    length = sizes.length(max(len(pack) for pack in packs))
    rows = [_row(pack, length, sizes.parts) for pack in packs]
    while len(rows) < (count or 0):
        rows.append({name: np.zeros_like(array) for name, array in rows[0].items()})
    columns: dict[str, Any] = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    trained = int(np.count_nonzero(columns["weights"], axis=1).max())
    return Arrays(**columns, chunks=np.asarray(-(-trained // CHUNK), np.int32))


def _row(pack: Pack, length: int, parts: int) -> dict[str, np.ndarray]:
    led = np.flatnonzero(pack.weights[pack.boundaries[:-1]])
    if len(led):
        found = ", ".join(str(pack.samples[i]) for i in led[:5])
        raise DataError(
            f"samples {found}: the first token has a weight, but nothing predicts it; its weight must be 0."
        )
    rows, own = np.flatnonzero(pack.weights[1:]), length // parts
    lengths = np.diff(pack.boundaries)
    trained = [(rows[rows // own == part], part) for part in range(parts)]
    return {
        "ids": _padded(pack.ids, length, np.int32)[None],
        "positions": _padded(pack.positions, length, np.int32)[None],
        "segments": _padded(np.repeat(np.arange(1, len(lengths) + 1), lengths), length, np.int32)[None],
        "rows": np.stack([_padded(some - part * own, own, np.int32) for some, part in trained]),
        "targets": np.stack([_padded(pack.ids[some + 1], own, np.int32) for some, _ in trained]),
        "weights": np.stack([_padded(pack.weights[some + 1], own, np.float32) for some, _ in trained]),
    }


def _padded(array: np.ndarray, length: int, dtype: type) -> np.ndarray:
    found: np.ndarray = np.zeros(length, dtype)
    found[: len(array)] = array
    return found
