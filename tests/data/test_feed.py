"""Batches are a pure function of data, settings, seed and step; every row is seen as often as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from training_hub.data.feed import Feed, FeedSettings, permutation, validation_packs
from training_hub.data.store import TokenStore
from training_hub.types import Origin, Sample


def make_store(lengths: list[int]) -> TokenStore:
    draw = np.random.default_rng(0)
    return TokenStore.from_samples(
        [
            Sample(
                draw.integers(0, 100, n).astype(np.int32),
                np.ones(n, dtype=np.float32),
                Origin("rows.jsonl", i + 1),
            )
            for i, n in enumerate(lengths)
        ]
    )


class Sourced:
    """A store of which some rows come from one source and some from another, with weights."""

    def __init__(self, store: TokenStore, source_index: list[int], weights: tuple[float, ...]):
        self._store = store
        self.source_index = np.array(source_index, dtype=np.int32)
        self.source_weights = weights

    def __getattr__(self, name):
        return getattr(self._store, name)

    def __len__(self):
        return len(self._store)


FIXED_ORDER = [7, 1, 6, 4, 3, 5, 0, 2]  # computed once, with numpy 2.4
SETTINGS = FeedSettings(samples_per_step=4, token_budget=64, seed=1, epochs=2)


def seen(feed: Feed, steps: range) -> list[int]:
    return [int(index) for step in steps for index in feed.indices(step)]


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    feed = Feed(make_store([5] * 10), SETTINGS)
    first, second = seen(feed, range(1, 4)), seen(feed, range(4, 7))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert feed.total_steps == 6


def test_the_same_step_is_the_same_batch_in_whatever_order_steps_are_asked_for():
    forward = Feed(make_store([3, 9, 4, 7, 5, 6, 2]), SETTINGS)
    backward = Feed(make_store([3, 9, 4, 7, 5, 6, 2]), SETTINGS)
    batches = {step: backward.batch(step) for step in reversed(range(1, forward.total_steps + 1))}
    for step in range(1, forward.total_steps + 1):
        for one, other in zip(forward.batch(step).packs, batches[step].packs, strict=True):
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.samples, other.samples)


@pytest.mark.parametrize("budget", [16, 33, 64, 1000])
def test_the_token_budget_changes_packs_and_never_what_a_step_learns_from(budget):
    store = make_store([3, 9, 4, 7, 5, 6, 2, 16])
    feed = Feed(store, replace(SETTINGS, token_budget=budget))
    usual = Feed(store, SETTINGS)
    for step in range(1, feed.total_steps + 1):
        batch = feed.batch(step)
        assert sorted(i for one in batch.packs for i in one.samples) == sorted(usual.indices(step))
        assert batch.trained_weight == usual.batch(step).trained_weight
        assert all(len(one) <= budget for one in batch.packs)


def test_without_shuffling_the_order_is_that_of_the_file():
    feed = Feed(make_store([5] * 6), replace(SETTINGS, is_shuffled=False))
    assert seen(feed, range(1, 3)) == list(range(6))


def test_weights_say_how_often_a_row_is_seen_and_halves_alternate():
    store = Sourced(make_store([5] * 12), [0] * 8 + [1] * 4, (0.5, 2.0))
    feed = Feed(store, replace(SETTINGS, epochs=2))
    epochs = [Counter(seen(feed, range(e * 3 + 1, e * 3 + 4))) for e in range(2)]
    assert [sum(n for i, n in epoch.items() if i < 8) for epoch in epochs] == [4, 4]
    assert all(epoch[i] == 2 for epoch in epochs for i in range(8, 12))
    assert {i for i in epochs[0] if i < 8} | {i for i in epochs[1] if i < 8} == set(range(8))


def test_fractions_of_an_epoch_and_steps_are_counted_exactly():
    store = make_store([5] * 10)
    assert Feed(store, replace(SETTINGS, epochs=1.5)).total_steps == 5
    assert Feed(store, replace(SETTINGS, epochs=0.1)).total_steps == 1
    assert Feed(store, replace(SETTINGS, epochs=None, steps=7)).total_steps == 7
    assert Feed(store, SETTINGS).batch(3).epoch == 1.0
    assert Feed(store, SETTINGS).batch(4).epoch == pytest.approx(1.4)


def test_another_seed_is_another_order_and_the_order_never_changes_between_versions():
    assert permutation(8, seed=42, stream=0, number=0).tolist() == FIXED_ORDER
    assert permutation(8, seed=43, stream=0, number=0).tolist() != FIXED_ORDER


def test_validation_covers_every_row_once():
    packs = list(validation_packs(make_store([5, 9, 3, 60, 2]), token_budget=64))
    assert sorted(i for one in packs for i in one.samples) == [0, 1, 2, 3, 4]
