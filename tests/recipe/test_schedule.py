"""The learning rate, against transformers' schedulers and by its own claims."""

from __future__ import annotations

import pytest

from training_hub.recipe.schedule import SHAPES, learning_rate
from training_hub.recipe.sections import LRScheduler

TOTAL = 40


def rates(total: int = TOTAL, peak: float = 1.0, **settings) -> list[float]:
    return [learning_rate(LRScheduler(**settings), peak, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize(("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant")])
def test_after_warm_up_the_rates_are_those_of_transformers(ours, theirs):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = 0 if theirs == "constant" else 5
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL)
    expected = []
    for _ in range(TOTAL):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(name=ours, warmup_steps=warmup)[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_warm_up_rises_to_the_peak_and_no_step_is_wasted_at_zero(name):
    values = rates(name=name, warmup_steps=4)
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[4] == pytest.approx(1.0)
    assert min(values) > 0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_end_is_near_the_minimum_and_never_below(name):
    values = rates(name=name, min_lr=0.1, decay_ratio=0.25)
    assert min(values) == values[-1]
    assert 0.1 <= values[-1] < 0.2


def test_wsd_stays_at_the_peak_until_its_last_share():
    values = rates(name="wsd", decay_ratio=0.25)
    assert values[:30] == [1.0] * 30
    assert values[30:] == pytest.approx([(40 - done) / 10 for done in range(30, 40)])


def test_warm_up_as_a_ratio_is_a_share_of_all_steps():
    assert rates(name="linear", warmup_ratio=0.1) == rates(name="linear", warmup_steps=4)


def test_inverse_square_root_halves_when_the_steps_since_warm_up_reach_three_timescales():
    values = rates(name="inverse_sqrt", warmup_steps=5)
    assert values[5 + 15] == pytest.approx(0.5)
