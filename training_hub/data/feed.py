"""Which samples each optimizer step learns from: a pure function of data, settings, seed and step.

Nothing here remembers how far a run has come, so going on after a stop is a question of asking for the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training_hub.data.columns import largest
from training_hub.data.packing import pack_all
from training_hub.data.shares import shares
from training_hub.data.shuffle import shuffled
from training_hub.data.store import TokenStore
from training_hub.recipe.sections import Data
from training_hub.types import Batch, Pack

# Validation rows are packed within windows of this many, so that memory stays bounded.
VALIDATION_WINDOW = 1024


@dataclass(frozen=True)
class FeedSettings:
    """What decides the batches, besides the data. `token_budget` bounds a pack and never changes a batch."""

    samples_per_step: int
    token_budget: int
    seed: int
    epochs: float | None = None
    steps: int | None = None
    is_shuffled: bool = True
    is_packed: bool = True


class Feed:
    """The batches of a run.

    An epoch shows each row of a source `weight` times: source s keeps an endless stream of its rows, one permutation
    after another, and epoch e takes the next round(weight x rows) of them. The sources are then shuffled together.
    The last step of an epoch may be smaller; no row is dropped.
    """

    def __init__(self, store: TokenStore, settings: FeedSettings):
        self.store = store
        self.settings = settings
        self._borders = store.source_borders
        self._counts = [
            max(1, round(weight * rows)) if rows else 0
            for rows, weight in zip(np.diff(self._borders).tolist(), store.source_weights, strict=True)
        ]
        self.samples_per_epoch = sum(self._counts)
        self.steps_per_epoch = math.ceil(self.samples_per_epoch / settings.samples_per_step)
        self.total_steps = self._total_steps()

    def _total_steps(self) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        fraction, whole = math.modf(self.settings.epochs or 1)
        part = math.ceil(fraction * self.samples_per_epoch / self.settings.samples_per_step)
        return int(whole) * self.steps_per_epoch + part

    def is_epoch_end(self, step: int) -> bool:
        """Whether `step` is the last of its epoch, or of the run."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def indices(self, step: int) -> np.ndarray:
        """Store indices of the samples of `step` (from 1), in order."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        start = place * self.settings.samples_per_step
        end = min(start + self.settings.samples_per_step, self.samples_per_epoch)
        return self._numbers(epoch, np.arange(start, end))

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The batch of `step`, which counts from 1: its numbers, and the packs of one of `world_size` processes.

        Whatever their number, together they have the samples of the step, each once; one may have none.
        """
        indices, store = self.indices(step), self.store
        mine = indices if world_size == 1 else indices[shares(store.lengths[indices], world_size) == rank]
        packs = pack_all(
            mine.tolist(), store.__getitem__, self.settings.token_budget, is_packed=self.settings.is_packed
        )
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        seen = min((place + 1) * self.settings.samples_per_step, self.samples_per_epoch)
        return Batch(
            step=step,
            epoch=epoch + seen / self.samples_per_epoch,
            packs=tuple(packs),
            num_samples=len(indices),
            num_tokens=int(store.lengths[indices].sum()),
            num_trained_tokens=int(store.trained_tokens[indices].sum()),
            trained_weight=float(store.trained_weight[indices].sum()),
        )

    def largest_pack(self) -> Pack:
        """The heaviest pack this run could meet: the longest samples, up to the token budget."""
        longest = largest(self.store.lengths, self.settings.samples_per_step)
        within = np.cumsum(self.store.lengths[longest]) <= self.settings.token_budget
        chosen = longest[within] if self.settings.is_packed else longest[:1]
        return pack_all(chosen.tolist(), self.store.__getitem__, self.settings.token_budget)[0]

    def _numbers(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The store indices that stand at these places of an epoch."""
        if self.settings.is_shuffled:
            places = shuffled(places, self.samples_per_epoch, self.settings.seed, 0, epoch)
        ends = np.cumsum(self._counts)
        of_source = np.searchsorted(ends, places, side="right")
        numbers = np.empty(len(places), np.int64)
        for source in np.unique(of_source).tolist():
            mine = of_source == source
            within = places[mine] - (ends[source] - self._counts[source])
            numbers[mine] = self._borders[source] + self._streamed(source, epoch * self._counts[source] + within)
        return numbers

    def _streamed(self, source: int, places: np.ndarray) -> np.ndarray:
        """The rows of `source` at these places of its endless stream of permutations."""
        size = int(self._borders[source + 1] - self._borders[source])
        rounds, rows = np.divmod(places, size)
        if not self.settings.is_shuffled:
            return rows
        for number in np.unique(rounds).tolist():
            mine = rounds == number
            rows[mine] = shuffled(rows[mine], size, self.settings.seed, source + 1, number)
        return rows


def packs_validation(data: Data) -> bool:
    """Whether the recipe asks for packed validation rows."""
    return data.packing if data.validation_packing is None else data.validation_packing


def validation_packs(store: TokenStore, token_budget: int, is_packed: bool = True) -> Iterator[Pack]:
    """Every sample of `store` once, in packs of at most `token_budget` tokens, or as many as its longest has."""
    token_budget = max(token_budget, int(store.lengths.max())) if len(store) else token_budget
    for start in range(0, len(store), VALIDATION_WINDOW):
        window = list(range(start, min(start + VALIDATION_WINDOW, len(store))))
        yield from pack_all(window, store.__getitem__, token_budget, is_packed=is_packed)
