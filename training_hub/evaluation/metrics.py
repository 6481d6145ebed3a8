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


Matrix = Sequence[Sequence[float]]
"""A[i][j]: the score on task j after training tasks 0 to i in turn; square, as many rows as tasks. Higher is better."""


def average_accuracy(scores: Matrix) -> float:
    """ACC: the mean over all tasks of the score at the end, (1/T) sum_j A[T-1][j].

    Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, equation 2. Raises DataError where the matrix is not square.
    """
    _refuse_uneven(scores)
    return sum(scores[-1]) / len(scores)


def backward_transfer(scores: Matrix) -> float:
    """BWT: what later tasks changed in earlier ones, (1/(T-1)) sum_{j<T-1} (A[T-1][j] - A[j][j]).

    Negative is forgetting. NaN for one task, which has no later one. Source: Lopez-Paz and Ranzato 2017,
    arXiv:1706.08840, equation 3.
    """
    _refuse_uneven(scores)
    earlier = len(scores) - 1
    return sum(scores[-1][j] - scores[j][j] for j in range(earlier)) / earlier if earlier else math.nan


def forgetting(scores: Matrix) -> float:
    """F: how far earlier tasks are below their best, (1/(T-1)) sum_{j<T-1} (max_{j<=i<T-1} A[i][j] - A[T-1][j]).

    Negative where the last task helped. NaN for one task. The maximum is over what was measured since the task was
    trained: before that there is nothing to forget. Source: Chaudhry et al. 2018, arXiv:1801.10112, section 3, where
    it is over all earlier rows.
    """
    _refuse_uneven(scores)
    earlier = len(scores) - 1
    lost = [max(scores[i][j] for i in range(j, earlier)) - scores[-1][j] for j in range(earlier)]
    return sum(lost) / earlier if earlier else math.nan


def new_task_score(scores: Matrix) -> float:
    """Each task's score just after it was trained, on average: (1/T) sum_j A[j][j].

    Methods are comparable in what they forget where they have learned as much, that is, at the same value of this.
    """
    _refuse_uneven(scores)
    return sum(scores[j][j] for j in range(len(scores))) / len(scores)


def _refuse_uneven(scores: Matrix) -> None:
    if not scores or any(len(row) != len(scores) for row in scores):
        shape = [len(row) for row in scores]
        raise DataError(
            f"scores: found rows of {shape} numbers; wanted: one row per task, each with one number per task."
        )
