"""What the steps of a run will hold, counted from the lengths of its samples alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from training_hub.data.columns import counts
from training_hub.data.feed import Feed
from training_hub.data.packing import assign
from training_hub.data.store import TokenStore

# Laying out packs costs a second per few hundred thousand samples; beyond these, steps are taken to go on alike.
SAMPLES_LAID_OUT = 200_000
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def forecast(feed: Feed, most_samples: int = SAMPLES_LAID_OUT) -> dict[str, Any]:
    """Totals over all steps: samples, tokens, trained tokens, packs, packs per step, and how full packs are (0 to 1).

    steps_laid_out: the steps that were laid out one by one, as they will be run. Where they are fewer than the steps of
    the run, the totals are theirs, scaled up.
    """
    lengths, trained = feed.store.lengths, feed.store.trained_tokens
    samples = tokens = trained_tokens = packs = steps = 0
    while steps < feed.total_steps and (steps == 0 or samples < most_samples):
        steps += 1
        chosen = feed.indices(steps)
        samples += len(chosen)
        tokens += int(lengths[chosen].sum())
        trained_tokens += int(trained[chosen].sum())
        packs += num_packs(feed, lengths[chosen])
    scale = feed.total_steps / steps
    return {
        "samples": round(samples * scale),
        "tokens": round(tokens * scale),
        "trained_tokens": round(trained_tokens * scale),
        "packs": round(packs * scale),
        "packs_per_step": packs / steps,
        "fill": tokens / (packs * feed.settings.token_budget),
        "steps_laid_out": steps,
    }


def num_packs(feed: Feed, lengths: np.ndarray) -> int:
    """Packs of one step whose samples have these lengths."""
    if not feed.settings.is_packed:
        return len(lengths)
    return len(assign(lengths.tolist(), feed.settings.token_budget))


def num_pack_sizes(feed: Feed, most: int) -> int:
    """How many numbers of tokens the packs of the run have, as far as it is laid out, up to `most`."""
    found: set[int] = set()
    samples = step = 0
    while step < feed.total_steps and len(found) < most and samples < SAMPLES_LAID_OUT:
        step += 1
        lengths = feed.store.lengths[feed.indices(step)].tolist()
        samples += len(lengths)
        if feed.settings.is_packed:
            packs = assign(lengths, feed.settings.token_budget)
            found.update(sum(lengths[place] for place in pack) for pack in packs)
        else:
            found.update(lengths)
    return min(len(found), most)


def length_quantiles(store: TokenStore) -> dict[str, int]:
    """Tokens per sample: the smallest length that the named share of samples does not exceed, and the longest."""
    found = sorted(counts(store.lengths).items())
    upto = np.cumsum([times for _, times in found])
    places = {name: int(np.searchsorted(upto, share * upto[-1])) for name, share in QUANTILES.items()}
    return {name: found[place][0] for name, place in places.items()} | {"max": found[-1][0]}
