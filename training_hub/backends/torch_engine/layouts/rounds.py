"""Packs dealt out one to each share of the processes in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from training_hub.types import Pack

T = TypeVar("T")


def dealt_in_rounds(packs: Iterable[Pack], size: int, rank: int) -> Iterator[tuple[Pack | None, int]]:
    """Of each round, which has a pack for each of `size` shares, that of share `rank`, and the tokens of all of them.

    None where there are fewer left than shares; a pass must be made all the same where the model is divided.
    """
    mine: Pack | None = None
    tokens = number = 0
    for number, one in enumerate(packs, 1):
        tokens += len(one)
        if (number - 1) % size == rank:
            mine = one
        if number % size == 0:
            yield mine, tokens
            mine, tokens = None, 0
    if number % size:
        yield mine, tokens


def batched(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """The items in lists of at most so many."""
    iterator = iter(items)
    while some := list(islice(iterator, most)):
        yield some
