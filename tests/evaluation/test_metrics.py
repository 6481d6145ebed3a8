from __future__ import annotations

import math

import pytest

from training_hub.errors import DataError
from training_hub.evaluation.metrics import (
    average_accuracy,
    backward_transfer,
    exact_match,
    forgetting,
    new_task_score,
    perplexity,
)


def test_perplexity_of_a_blind_guess_is_the_number_of_choices():
    assert perplexity(math.log(512)) == pytest.approx(512)
    assert perplexity(0.0) == 1.0


def test_perplexity_beyond_a_float_is_infinite_and_of_nan_is_nan():
    assert perplexity(1000.0) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_exact_match_is_the_share_that_equals_but_for_outer_white_space():
    assert exact_match(["42", " 42\n", "4 2", "forty-two"], ["42", "42", "42", "Forty-two"]) == 0.5


def test_exact_match_refuses_lists_of_different_length_and_nothing_at_all():
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(DataError, match="at least one"):
        exact_match([], [])


# Three tasks: the first is forgotten, the second improves when the third is learned.
SCORES = ((0.9, 0.1, 0.0), (0.5, 0.6, 0.2), (0.3, 0.8, 0.7))


def test_the_average_is_over_all_tasks_at_the_end():
    assert average_accuracy(SCORES) == pytest.approx((0.3 + 0.8 + 0.7) / 3)


def test_backward_transfer_compares_the_end_with_when_a_task_was_learned():
    assert backward_transfer(SCORES) == pytest.approx(((0.3 - 0.9) + (0.8 - 0.6)) / 2)


def test_forgetting_is_measured_from_the_best_since_a_task_was_learned():
    assert forgetting(SCORES) == pytest.approx(((0.9 - 0.3) + (0.6 - 0.8)) / 2)
    # The second task was never better than before it was trained: that is not forgetting.
    known_before = ((0.5, 0.9, 0.0), (0.7, 0.6, 0.0), (0.4, 0.6, 1.0))
    assert forgetting(known_before) == pytest.approx(((0.7 - 0.4) + 0.0) / 2)


def test_what_was_learned_is_read_along_the_diagonal():
    assert new_task_score(SCORES) == pytest.approx((0.9 + 0.6 + 0.7) / 3)


def test_nothing_is_forgotten_where_nothing_moves():
    still = ((0.5, 0.5), (0.5, 0.5))
    assert backward_transfer(still) == forgetting(still) == 0.0


def test_a_single_task_has_nothing_to_be_forgotten():
    assert average_accuracy(((0.5,),)) == new_task_score(((0.5,),)) == 0.5
    assert math.isnan(backward_transfer(((0.5,),))) and math.isnan(forgetting(((0.5,),)))


@pytest.mark.parametrize("uneven", [(), ((0.1, 0.2),), ((0.1,), (0.1, 0.2))])
def test_a_matrix_that_is_not_square_is_refused(uneven: tuple[tuple[float, ...], ...]):
    with pytest.raises(DataError, match="one row per task"):
        backward_transfer(uneven)
