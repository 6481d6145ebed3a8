"""How many sizes packs have, which libraries keep something for, is counted from lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.data.test_feed import SETTINGS, make_store
from training_hub.data.feed import Feed
from training_hub.data.forecast import num_pack_sizes


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("lengths", [[5] * 12, [3, 9, 4, 7, 5, 6, 2], list(range(1, 40))])
def test_sizes_are_those_of_the_packs_of_the_run(lengths, is_packed):
    feed = Feed(make_store(lengths), replace(SETTINGS, is_packed=is_packed))
    wanted = {len(pack.ids) for step in range(1, feed.total_steps + 1) for pack in feed.batch(step).packs}
    assert num_pack_sizes(feed, 100) == len(wanted)
    assert num_pack_sizes(feed, 1) == 1
