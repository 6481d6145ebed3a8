"""Scores as pure functions of what a model predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training_hub.errors import DataError


def perplexity(mean_nll: float) -> float:
    """exp of the mean negative log-likelihood per token, in nats: 1 is certain, the vocabulary size is a blind guess.

    Infinite where it is larger than a float can hold, NaN where the mean is NaN.
    """
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that equal their reference, from 0 to 1; white space around either does not count.

    Raises DataError where there are none, or not as many of one as of the other.
    """
    if len(predictions) != len(references):
        raise DataError(f"exact_match: {len(predictions)} predictions for {len(references)} references; one for each.")
    if not references:
        raise DataError("exact_match: no predictions; a score needs at least one.")
    same = sum(
        prediction.strip() == reference.strip() for prediction, reference in zip(predictions, references, strict=True)
    )
    return same / len(references)
