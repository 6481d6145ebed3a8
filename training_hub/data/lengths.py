"""Samples that are too long, and documents that become blocks: nothing is cut that is not counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from training_hub.data.store import TokenStore
from training_hub.types import Sample


def fit(samples: Sequence[Sample], longest: int, policy: str, tally: Counter[str]) -> list[Sample]:
    """The samples with those over `longest` tokens dropped, truncated or split by `policy`; `tally` counts each.

    error and drop leave them out (the caller raises for error). truncate cuts the end, and leaves out what then has
    nothing trained. split cuts pieces that overlap by one token, so that every trained token is predicted once.
    """
    fitting: list[Sample] = []
    for sample in samples:
        if len(sample) <= longest:
            fitting.append(sample)
            continue
        tally["overlong"] += 1
        if policy == "truncate":
            fitting.extend(_truncated(sample, longest, tally))
        elif policy == "split":
            fitting.extend(_pieces(sample, longest, tally))
        elif policy == "drop":
            tally["dropped"] += 1
            _count_lost(sample, 0, tally)
    return fitting


def _count_lost(sample: Sample, kept: int, tally: Counter[str]) -> None:
    tally["tokens_lost"] += len(sample) - kept
    tally["trained_tokens_lost"] += int(np.count_nonzero(sample.weights[kept:]))


def _truncated(sample: Sample, longest: int, tally: Counter[str]) -> list[Sample]:
    cut = Sample(sample.ids[:longest], sample.weights[:longest], sample.origin)
    if not cut.weights.any():
        tally["dropped"] += 1
        _count_lost(sample, 0, tally)
        return []
    tally["truncated"] += 1
    _count_lost(sample, longest, tally)
    return [cut]


def _pieces(sample: Sample, longest: int, tally: Counter[str]) -> Iterator[Sample]:
    tally["split"] += 1
    # A piece of one token has nothing to predict; with longest = 1 there would be no way on.
    for start in range(0, len(sample) - 1, max(longest - 1, 1)):
        weights = sample.weights[start : start + longest].copy()
        weights[0] = 0.0
        if weights.any():
            tally["pieces"] += 1
            yield Sample(sample.ids[start : start + longest], weights, sample.origin)
        else:
            tally["pieces_untrained"] += 1


def blocks(documents: TokenStore, block_size: int) -> Iterator[tuple[int, Sample]]:
    """The documents laid end to end and cut every `block_size` tokens, each with the number of its first document.

    Every token has weight 1 but the first of a block, which nothing predicts. The last block is as long as it is,
    never padded; a single token that would be left over is left out, since nothing predicts it. Sources are not
    joined with each other, so that each block has the weight of its own.
    """
    of_source = documents.source_index
    held: list[np.ndarray] = []
    num_held, first = 0, 0
    for number in range(len(documents)):
        ids = documents[number].ids
        if held and of_source[number] != of_source[first]:
            if num_held > 1:
                yield first, _block(held, documents, first)
            held, num_held = [], 0
        while len(ids):
            if not held:
                first = number
            taken = ids[: block_size - num_held]
            held.append(taken)
            num_held += len(taken)
            ids = ids[len(taken) :]
            if num_held == block_size:
                yield first, _block(held, documents, first)
                held, num_held = [], 0
    if num_held > 1:
        yield first, _block(held, documents, first)


def _block(held: list[np.ndarray], documents: TokenStore, first: int) -> Sample:
    ids = np.concatenate(held)
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0.0
    return Sample(ids, weights, documents.origin(first))
