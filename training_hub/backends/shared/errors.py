"""Errors that end a run, in words that are the same whichever engine ran it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training_hub.errors import Interrupted, TrainingError
from training_hub.recipe import Recipe

ROWS_NAMED = 20  # in the error about a loss that is not finite


@dataclass(frozen=True)
class Lost:
    """A step whose loss or gradient is not finite. rows: who did it, as a sentence without its full stop."""

    step: int
    loss: float
    grad_norm: float
    rows: str


def not_finite(lost: Lost, recipe: Recipe, skipped_in_row: int, saved: Sequence[int]) -> TrainingError:
    """The error about it. skipped_in_row: steps left out up to now; saved: the steps of whole checkpoints."""
    rate, remedy = recipe.optimizer.lr, "training.on_nonfinite: skip"
    kept = "Nothing of this step was kept or saved"
    if skipped_in_row >= recipe.training.max_skipped:
        kept = f"{skipped_in_row} steps in a row are left out now, as many as training.max_skipped allows"
        remedy = f"training.max_skipped: {10 * skipped_in_row}"
    return TrainingError(
        f"step {lost.step}: loss {lost.loss}, gradient norm {lost.grad_norm}: not finite. {kept}; "
        f"{newest_saved(saved)}. {lost.rows}. Look at these rows; or write optimizer.lr: {rate / 10:g} (now {rate:g}), "
        f"or {remedy}."
    )


def broken(problems: Sequence[str], step: int, recipe: Recipe, saved: Sequence[int]) -> TrainingError:
    """The error about weights that are not finite after `step`: no run could go on from such a checkpoint."""
    rate = recipe.optimizer.lr
    return TrainingError(
        [
            *problems,
            f"Step {step} moved the weights there; its checkpoint is not written, and {newest_saved(saved)}. "
            f"optimizer.lr is {rate:g}: write {rate / 10:g} or less.",
        ]
    )


def interrupted(number: int, step: int, total_steps: int, folder: Path) -> Interrupted:
    """The error about signal `number`, after `step` was saved in `folder`."""
    return Interrupted(
        f"{signal.Signals(number).name} received: stopped after step {step} of {total_steps}, saved in {folder}. Run "
        "the same command again to go on from there.",
        signal_number=number,
    )


def newest_saved(steps: Sequence[int]) -> str:
    """What there is to go on from."""
    return f"the newest checkpoint is step-{steps[-1]}" if steps else "no checkpoint was due before it"


def listed(rows: Sequence[str]) -> str:
    """The rows by name, the first of many."""
    return ", ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
