"""The learning rate as a pure function of the step: no state to save, the same in every engine."""

from __future__ import annotations

import math
from collections.abc import Callable

from training_hub.recipe.sections import LRScheduler

# transformers 5.23 `get_inverse_sqrt_schedule`: the timescale where there is no warm-up.
INVERSE_SQRT_TIMESCALE = 10_000


def warmup_steps(settings: LRScheduler, total_steps: int) -> int:
    """Steps of warm-up in a run of `total_steps`."""
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * total_steps)
    return settings.warmup_steps or 0


def learning_rate(settings: LRScheduler, peak: float, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 1) of `total_steps`.

    After warm-up the shapes are those of transformers 5.23 `get_scheduler`, whose counter is step - 1. Warm-up is
    step / (warmup + 1), as in torchtitan: transformers starts at 0, which makes the first step do nothing.
    """
    done = step - 1
    warmup = warmup_steps(settings, total_steps)
    if done < warmup:
        return peak * (done + 1) / (warmup + 1)
    shape = SHAPES[settings.name]
    return settings.min_lr + (peak - settings.min_lr) * shape(done, warmup, total_steps, settings.decay_ratio)


def _constant(done: int, warmup: int, total: int, decay_ratio: float) -> float:
    return 1.0


def _linear(done: int, warmup: int, total: int, decay_ratio: float) -> float:
    return max(0.0, (total - done) / max(1, total - warmup))


def _cosine(done: int, warmup: int, total: int, decay_ratio: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / max(1, total - warmup))))


def _inverse_sqrt(done: int, warmup: int, total: int, decay_ratio: float) -> float:
    timescale = warmup or INVERSE_SQRT_TIMESCALE
    return 1.0 / math.sqrt((done - warmup + timescale) / timescale)


def _warmup_stable_decay(done: int, warmup: int, total: int, decay_ratio: float) -> float:
    decay = max(1, math.ceil(decay_ratio * total))
    return min(1.0, max(0.0, (total - done) / decay))


SHAPES: dict[str, Callable[[int, int, int, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _warmup_stable_decay,
}
