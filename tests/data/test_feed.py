"""Batches are a pure function of data, settings, seed and step; every row is seen as often as asked."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from training_hub.data.feed import Feed, FeedSettings, validation_packs
from training_hub.data.shuffle import shuffled
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


def sourced(store: TokenStore, source_index: list[int], weights: tuple[float, ...]) -> TokenStore:
    """A store of which some rows come from one source and some from another, with weights."""
    columns = {**store.columns, "sources": np.array(source_index, dtype=np.int32)}
    return replace(store, columns=columns, source_weights=weights)


FIXED_ORDER = [5, 6, 0, 2, 3, 7, 4, 1]  # computed once
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
    store = sourced(make_store([5] * 12), [0] * 8 + [1] * 4, (0.5, 2.0))
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


def order(size: int, seed: int = 42, stream: int = 0, number: int = 0) -> list[int]:
    return shuffled(np.arange(size), size, seed, stream, number).tolist()


def test_another_seed_is_another_order_and_the_order_never_changes_between_versions():
    assert order(8) == FIXED_ORDER
    assert len({tuple(order(8, *key)) for key in [(42, 0, 0), (43, 0, 0), (42, 1, 0), (42, 0, 1)]}) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 65_537])
def test_a_drawn_order_holds_every_place_once_and_is_the_same_place_by_place(size):
    whole = order(size)
    assert sorted(whole) == list(range(size))
    some = np.array([0, size // 2, size - 1])
    assert shuffled(some, size, 42, 0, 0).tolist() == [whole[place] for place in some]


@pytest.mark.parametrize(("size", "most"), [(3, 25), (4, 60), (5, 190)])  # exceeded once in 10,000 fair draws
def test_every_order_of_a_few_rows_comes_up_about_as_often_as_any_other(size, most):
    found = Counter(tuple(order(size, seed)) for seed in range(1200))
    assert len(found) == math.factorial(size)
    expected = 1200 / len(found)
    assert sum((times - expected) ** 2 / expected for times in found.values()) < most


def test_neighbours_in_a_file_are_not_neighbours_in_an_epoch():
    places = np.array(order(10_000))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert np.count_nonzero(np.abs(np.diff(places)) == 1) < 12  # two are to be expected


def test_validation_covers_every_row_once():
    packs = list(validation_packs(make_store([5, 9, 3, 60, 2]), token_budget=64))
    assert sorted(i for one in packs for i in one.samples) == [0, 1, 2, 3, 4]


def test_a_validation_row_longer_than_the_budget_is_measured_in_packs_that_hold_it():
    """The budget comes from the rows that are trained; that of validation grows with its own longest."""
    packs = list(validation_packs(make_store([10, 90, 20]), token_budget=32))
    assert sorted(int(index) for one in packs for index in one.samples) == [0, 1, 2]
    assert max(len(one) for one in packs) == 90
