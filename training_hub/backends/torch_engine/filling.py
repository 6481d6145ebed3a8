"""Packs filled up to one of a few sizes, so that what is recorded of one pack can be repeated for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training_hub.backends.torch_engine.tensors import PackTensors, put, refuse_trained_starts
from training_hub.types import Pack

PARTS = 8
"""Sizes lie an eighth of the largest pack apart, in tokens and in trained ones."""


@dataclass(frozen=True)
class Size:
    """What packs are filled up to: tokens, trained positions, documents; and the most tokens that one of these has."""

    tokens: int
    trained: int
    documents: int
    longest: int

    @classmethod
    def of(cls, pack: Pack, budget: int) -> Size:
        """The least that holds the pack. budget: tokens of a large pack."""
        step = max(1, -(-budget // PARTS))
        tokens, trained = _up_to(len(pack), step), int(np.count_nonzero(pack.weights[1:]))
        longest = _power(int(np.diff(pack.boundaries).max()))
        documents = len(pack.samples) + -(-(tokens - len(pack)) // longest)
        return cls(tokens, min(_up_to(max(1, trained), step), tokens - 1), _power(documents), longest)


class Untold(tuple[int, ...]):
    """Lengths of documents that nobody may read: what is recorded with them meets packs of other lengths."""

    def __iter__(self) -> Any:
        raise RuntimeError("the host reads how long documents are, as attention by documents does")

    def __getitem__(self, place: Any) -> Any:
        return self.__iter__()


@dataclass(frozen=True)
class FilledPack(PackTensors):
    """A pack with documents of zeros behind it, which nothing is learned from, and empty ones behind these.

    rows, as many as its size says, end in a place in front of a token without a weight.
    """

    most: int = 0

    @property
    def longest(self) -> int:
        """The most tokens that a document of a pack of this size has."""
        return self.most

    def copy_(self, other: FilledPack) -> None:
        """Take over the numbers of a pack of the same size."""
        for name in TENSORS:
            getattr(self, name).copy_(getattr(other, name))


TENSORS = ("ids", "positions", "weights", "cu_seqlens", "rows")


def filled(pack: Pack, size: Size, device: torch.device | str) -> FilledPack:
    """The pack as tensors on `device`, filled up to `size`. Raises DataError as `to_device` does."""
    refuse_trained_starts(pack)
    space = size.tokens - len(pack)
    ends = np.minimum(len(pack) + size.longest * np.arange(1, size.documents - len(pack.samples) + 1), size.tokens)
    lengths = np.diff(np.append(pack.boundaries, ends))
    weights = np.pad(pack.weights, (0, space)).astype(np.float32)
    rows, more = np.flatnonzero(weights[1:]), size.trained - int(np.count_nonzero(weights[1:]))
    unlearned = np.flatnonzero(weights[1:] == 0)[:1].repeat(more)  # there is one where there are more
    return FilledPack(
        ids=put(np.pad(pack.ids, (0, space)).astype(np.int64)[None], device),
        positions=put(np.append(pack.positions, np.arange(space) % size.longest).astype(np.int64)[None], device),
        weights=put(weights[None], device),
        lengths=tuple(int(length) for length in lengths if length),
        cu_seqlens=put(np.append(pack.boundaries, ends).astype(np.int32), device),
        rows=put(np.append(rows, unlearned).astype(np.int64), device),
        on_host=pack,
        most=size.longest,
    )


def _up_to(number: int, step: int) -> int:
    return -(-number // step) * step


def _power(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()
