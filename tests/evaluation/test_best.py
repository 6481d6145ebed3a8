"""The best evaluation, and when to stop waiting for a better one."""

from __future__ import annotations

import json
import math

import pytest

from training_hub.evaluation.best import Best
from training_hub.recipe.evaluation import Evaluation


def best(**settings: object) -> Best:
    return Best(Evaluation.model_validate({"generate": True, **settings}))


def test_less_loss_and_more_of_a_score_is_better():
    lower, higher = best(), best(best_metric="exact_match")
    losses = [lower.note({"loss": value}, step) for step, value in enumerate((3.0, 2.0, 2.5, 2.0, 1.0), 1)]
    scores = [higher.note({"exact_match": value}, step) for step, value in enumerate((0.1, 0.3, 0.3, 0.2, 0.4), 1)]
    assert losses == [True, True, False, False, True] and (lower.value, lower.step) == (1.0, 5)
    assert scores == [True, True, False, False, True] and (higher.value, higher.step) == (0.4, 5)


def test_the_direction_can_be_said():
    own = best(best_metric="distance", best_mode="min")
    assert [own.note({"distance": value}, 1) for value in (4.0, 5.0, 3.0)] == [True, False, True]


def test_the_run_stops_after_so_many_evaluations_without_a_better_one():
    waiting = best(early_stopping_patience=2)
    reasons = []
    for step, loss in enumerate((3.0, 3.1, 2.9, 3.0, 2.95), 1):
        waiting.note({"loss": loss}, step)
        reasons.append(bool(waiting.reason))
    assert reasons == [False, False, False, False, True]
    assert "2 evaluations" in waiting.reason and "2.9000 at step 3" in waiting.reason


def test_small_gains_are_kept_as_best_but_do_not_prolong_the_run():
    waiting = best(early_stopping_patience=3, early_stopping_min_delta=0.1)
    assert all(waiting.note({"loss": 3.0 - 0.04 * step}, step) for step in range(3))
    assert waiting.waited == 2 and waiting.step == 2
    waiting.note({"loss": 2.88}, 3)  # together they are more than the delta
    assert waiting.waited == 0


def test_nan_is_never_best_and_counts_as_waiting():
    waiting = best(early_stopping_patience=2)
    assert not waiting.note({"loss": math.nan}, 1)
    assert not waiting.note({"loss": math.nan}, 2)
    assert waiting.reason and "none was finite" in waiting.reason


def test_what_a_checkpoint_notes_goes_on_as_if_unbroken_unless_another_metric_is_asked():
    before = best(early_stopping_patience=3)
    for step, loss in enumerate((3.0, 2.0, 2.5), 1):
        before.note({"loss": loss}, step)
    state = json.loads(json.dumps(before.state(), allow_nan=False))
    after = best(early_stopping_patience=3)
    after.load(state)
    assert (after.value, after.step, after.mark, after.waited) == (2.0, 2, 2.0, 1)
    other = best(best_metric="exact_match")
    other.load(state)
    assert other.value is None and other.waited == 0


def test_a_metric_that_was_not_measured_is_a_mistake_of_the_program():
    with pytest.raises(KeyError):
        best(best_metric="bleu").note({"loss": 1.0}, 1)
