"""Which samples are trained on: exact duplicates, and the split into training and validation.

All decisions are per row, by the hash of its content: samples of one row stay together, and so do duplicates.
"""

from __future__ import annotations

import numpy as np

from training_hub.data.columns import stretches
from training_hub.data.shuffle import mixed
from training_hub.data.store import TokenStore
from training_hub.errors import DataError


def num_duplicates(store: TokenStore) -> int:
    """Rows whose content an earlier row has."""
    begins, repeats = store.column("begins"), store.column("repeats")
    return sum(int(np.count_nonzero(begins[part] & repeats[part])) for part in stretches(len(store)))


def without_duplicates(store: TokenStore) -> TokenStore:
    """The store with only the first of rows that are exactly equal."""
    return store.subset(np.flatnonzero(store.column("repeats") == 0))


def split_validation(store: TokenStore, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """(training, validation): `fraction` of the distinct contents, at least one, is set aside.

    Which ones depends on content and seed alone: not on the order of rows, nor on how often one is repeated.
    Raises DataError where nothing would be left to train on.
    """
    is_first = (store.column("begins") > store.column("repeats")).nonzero()[0]
    count = max(1, round(fraction * len(is_first)))
    if count >= len(is_first):
        raise DataError(
            f"data.validation_fraction: {fraction} of {len(is_first)} distinct rows leaves nothing to train on; "
            "give more rows, or set it to 0."
        )
    drawn = _drawn(store, seed)
    last = np.partition(drawn[is_first], count - 1)[count - 1]
    return store.subset(np.flatnonzero(drawn > last)), store.subset(np.flatnonzero(drawn <= last))


def _drawn(store: TokenStore, seed: int) -> np.ndarray:
    """A number for each sample, [n] uint64, from its row's content and the seed alone."""
    halves = store.column("hashes")[:, 0]
    return mixed(halves ^ mixed(np.array([seed % (1 << 64)], np.uint64)))


def num_shared(train: TokenStore, validation: TokenStore) -> int:
    """How many samples of `validation` come from a row that `train` also holds."""
    wanted, trained = validation.column("hashes")[:, 0], train.column("hashes")[:, 0]
    is_shared = np.zeros(len(wanted), bool)
    for part in stretches(len(trained)):
        is_shared |= np.isin(wanted, trained[part])
    return int(is_shared.sum())
