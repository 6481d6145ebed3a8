"""The samples of a step are dealt out to processes: each once, about as many tokens for each, by lengths alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.test_feed import SETTINGS, make_store
from training_hub.data.feed import Feed
from training_hub.data.shares import shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_no_process_has_more_than_a_sample_above_the_one_with_least(world_size: int, count: int):
    lengths = np.random.default_rng(count).integers(1, 500, count)
    taken = shares(lengths, world_size)
    loads = [int(lengths[taken == rank].sum()) for rank in range(world_size)]
    assert sum(loads) == lengths.sum()
    assert max(loads) - min(loads) <= lengths.max()
    assert np.array_equal(taken, shares(lengths, world_size))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_together_the_processes_have_the_batch_of_one(world_size: int):
    feed = Feed(make_store([3, 9, 4, 7, 5, 6, 2, 8, 1, 11]), SETTINGS)
    for step in range(1, feed.total_steps + 1):
        whole = feed.batch(step)
        each = [feed.batch(step, rank, world_size) for rank in range(world_size)]
        found = sorted(int(sample) for batch in each for one in batch.packs for sample in one.samples)
        assert found == sorted(feed.indices(step).tolist())
        for batch in each:
            assert (batch.num_samples, batch.num_tokens) == (whole.num_samples, whole.num_tokens)
            assert (batch.trained_weight, batch.num_trained_tokens) == (whole.trained_weight, whole.num_trained_tokens)
