from __future__ import annotations

import math

import pytest

from training_hub.errors import DataError
from training_hub.evaluation.metrics import exact_match, perplexity


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
