from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from training_hub.recipe import Recipe
from training_hub.types import StepReport

FIRST = StepReport(
    step=1,
    total_steps=1000,
    epoch=0.01,
    loss=3.2449999,
    learning_rate=1e-5,
    grad_norm=1.25,
    tokens=4096,
    trained_tokens=1024,
    samples=32,
    tokens_per_second=12_345.6,
    step_seconds=0.33,
    memory_gib=1.5,
    seconds_left=3723.0,
    time=1_760_448_000.25,
)


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def report() -> Callable[..., StepReport]:
    """A report like the first of a run, but for what is given."""
    return lambda **changes: replace(FIRST, **changes)


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A recipe with these monitoring settings."""
    return lambda **monitoring: Recipe.model_validate(
        {"output": "out", "model": {"path": "model"}, "monitoring": monitoring}
    )
