"""Packs are padded to few lengths, and a run says what that costs."""

from __future__ import annotations

import numpy as np
import pytest

from training_hub.backends.jax_engine.batches import CHUNK, Sizes


@pytest.mark.parametrize("longest", [1, 300, 4096, 8192, 100_001])
def test_there_are_eight_lengths_at_most_and_a_third_is_padding_at_most(longest):
    sizes = Sizes.of(longest)
    assert len(sizes.lengths) <= 8 and sizes.lengths[-1] >= longest
    assert all(length % CHUNK == 0 for length in sizes.lengths)
    for tokens in np.linspace(max(longest // 8, 4 * CHUNK), longest, 50, dtype=int):
        if tokens <= longest:
            assert sizes.length(int(tokens)) - tokens <= sizes.length(int(tokens)) / 3 + CHUNK


def test_padding_is_told_as_a_share_of_all_places():
    class Pack(list):
        pass

    packs = [Pack(range(1000)), Pack(range(600)), Pack(range(100))]
    sizes = Sizes((256, 512, 1024))
    assert sizes.padded_fraction(packs, 1) == pytest.approx(1 - 1700 / (1024 + 1024 + 256))
    # Side by side the shorter takes as much as the longer, and a place that no pack takes is padding too.
    assert sizes.padded_fraction(packs, 2) == pytest.approx(1 - 1700 / (2 * 1024 + 2 * 256))
