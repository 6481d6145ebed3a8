"""What is found a stretch at a time is what is found in the whole."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training_hub.data import columns, rows
from training_hub.data.columns import counts, largest, smallest, stretches
from training_hub.data.rows import mark_rows

VALUES = np.random.default_rng(7).integers(0, 20, 103)


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """Stretches so short that this much data is many of them."""
    monkeypatch.setattr(columns, "STRETCH", 10)
    monkeypatch.setattr(rows, "COMPARED", 16)


def test_stretches_cover_every_place_once():
    assert [place for part in stretches(103) for place in range(103)[part]] == list(range(103))
    assert list(stretches(0)) == []


def test_counts_and_extremes_are_those_of_the_whole():
    assert counts(VALUES) == Counter(VALUES.tolist())
    assert smallest(VALUES, 7).tolist() == np.argsort(VALUES, kind="stable")[:7].tolist()
    assert largest(VALUES, 7).tolist() == np.argsort(-VALUES, kind="stable")[:7].tolist()
    assert largest(VALUES, 200).tolist() == np.argsort(-VALUES, kind="stable").tolist()


def test_rows_and_repeats_are_those_found_one_by_one():
    # rows of one to three samples, in two parts, of few contents so that many repeat
    draw = np.random.default_rng(3)
    samples = []
    for line in range(80):
        content = draw.integers(0, 12, 2)
        samples += [(line % 40, line // 40, *content)] * int(draw.integers(1, 4))
    lines, parts, *halves = np.array(samples, np.int64).T
    begins, repeats = np.zeros(len(lines), np.uint8), np.zeros(len(lines), np.uint8)
    mark_rows(lines, parts, np.stack(halves, 1).astype(np.uint64), begins, repeats)

    seen, expected_begins, expected_repeats = set(), [], []
    for number, (line, part, *content) in enumerate(samples):
        is_first = number == 0 or samples[number - 1][:2] != (line, part)
        is_repeat = tuple(content) in seen if is_first else expected_repeats[-1]
        expected_begins.append(is_first)
        expected_repeats.append(is_repeat)
        seen.add(tuple(content))
    assert begins.tolist() == expected_begins
    assert repeats.tolist() == expected_repeats
    assert 0 < sum(expected_repeats) < len(samples)
