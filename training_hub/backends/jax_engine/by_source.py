"""The loss of each source of the data, step by step."""

# B packs side by side, N trained positions of a part of one, S sources

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training_hub.backends.shared.sources import metric_names
from training_hub.data.store import TokenStore
from training_hub.types import Pack


class BySource:
    """Sums of one step: of the losses and of the weights of each source's trained tokens.

    parts: into which the tokens of a pack are divided, each with rows of its own.
    """

    def __init__(self, sources: Sequence[str], store: TokenStore, what: str = "source_loss", parts: int = 1):
        self._names = metric_names(sources, what)
        self._of_sample, self._parts = store.source_index, parts
        self._sums_2S = np.zeros((2, len(sources)))

    def begin(self) -> None:
        """Forget the last step."""
        self._sums_2S[:] = 0

    def add(self, packs: Sequence[Pack], losses_BN: np.ndarray) -> None:
        """Add the weighted losses of packs side by side, in the order of their trained positions."""
        length = losses_BN.shape[-1]
        for pack, of_parts in zip(packs, losses_BN.reshape(-1, self._parts, length), strict=False):
            rows = np.flatnonzero(pack.weights[1:])
            counts = np.bincount(rows // length, minlength=self._parts)
            losses = np.concatenate([some[:count] for some, count in zip(of_parts, counts, strict=True)])
            documents = np.searchsorted(pack.boundaries, rows, side="right") - 1
            sources = self._of_sample[pack.samples[documents]]
            np.add.at(self._sums_2S[0], sources, losses.astype(np.float64))
            np.add.at(self._sums_2S[1], sources, pack.weights[rows + 1].astype(np.float64))

    def means(self) -> dict[str, float]:
        """The mean loss of each source that the step had."""
        return {
            name: float(loss / weight) for name, loss, weight in zip(self._names, *self._sums_2S, strict=True) if weight
        }
