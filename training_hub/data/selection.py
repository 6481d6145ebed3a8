"""Which samples are trained on: exact duplicates, and the split into training and validation.

All decisions are per row, by the hash of its content: samples of one row stay together, and so do duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training_hub.data.store import TokenStore
from training_hub.errors import DataError


@dataclass(frozen=True)
class RowTable:
    """The rows of a store: `row_of` [samples] is the row of each sample, `content_of` [rows] its content's number.

    Rows of equal content share a number; numbers go by first appearance. `hashes` [contents] is half of each hash.
    """

    row_of: np.ndarray
    content_of: np.ndarray
    hashes: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.content_of)

    @property
    def num_duplicates(self) -> int:
        """Rows whose content an earlier row has."""
        return len(self.content_of) - len(self.hashes)

    def first_rows(self) -> np.ndarray:
        """[rows] bool: the first row of each content."""
        is_first = np.zeros(self.num_rows, bool)
        is_first[np.unique(self.content_of, return_index=True)[1]] = True
        return is_first


def rows_of(store: TokenStore) -> RowTable:
    """The rows of a store: neighbouring samples of the same part and line are one row."""
    lines, parts, hashes = store.column("lines"), store.column("parts"), store.column("hashes")
    begins = np.ones(len(store), bool)
    begins[1:] = (lines[1:] != lines[:-1]) | (parts[1:] != parts[:-1])
    of_rows = hashes[begins]
    # Sorted by hash, stable, so that the first of equal rows comes first.
    order = np.lexsort((of_rows[:, 1], of_rows[:, 0]))
    in_order = of_rows[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    group = np.cumsum(is_new) - 1
    first = order[is_new]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    content_of = np.empty(len(order), np.int64)
    content_of[order] = rank[group]
    return RowTable(np.cumsum(begins) - 1, content_of, of_rows[np.sort(first), 0])


def without_duplicates(store: TokenStore, rows: RowTable) -> TokenStore:
    """The store with only the first of rows that are exactly equal."""
    return store.subset(np.flatnonzero(rows.first_rows()[rows.row_of]))


def split_validation(store: TokenStore, rows: RowTable, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """(training, validation): `fraction` of the distinct contents, at least one, is set aside.

    Which ones depends on content and seed alone: not on the order of rows, nor on how often one is repeated.
    Raises DataError where nothing would be left to train on.
    """
    contents = len(rows.hashes)
    count = max(1, round(fraction * contents))
    if count >= contents:
        raise DataError(
            f"data.validation_fraction: {fraction} of {contents} distinct rows leaves nothing to train on; "
            "give more rows, or set it to 0."
        )
    drawn = _mixed(rows.hashes ^ _mixed(np.array([seed % (1 << 64)], np.uint64)))
    aside = np.zeros(contents, bool)
    aside[np.argsort(drawn, kind="stable")[:count]] = True
    of_sample = aside[rows.content_of[rows.row_of]]
    return store.subset(np.flatnonzero(~of_sample)), store.subset(np.flatnonzero(of_sample))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each number replaced by an unrelated one: the finaliser of splitmix64 (Steele et al. 2014, OOPSLA)."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def num_shared(train: TokenStore, validation: TokenStore) -> int:
    """How many samples of `validation` come from a row that `train` also holds."""
    return int(np.isin(validation.column("hashes")[:, 0], train.column("hashes")[:, 0]).sum())
