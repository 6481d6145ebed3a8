"""Who hears of each step: opened together from the recipe, closed together whatever happens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training_hub.errors import HubError, Interrupted, RecipeError, TrainingError
from training_hub.monitoring import mlflow, tensorboard, wandb
from training_hub.monitoring.jsonl import FILE_NAME, MetricsFile
from training_hub.monitoring.progress_line import step_watcher
from training_hub.recipe import Recipe
from training_hub.types import Console, StepReport

Watcher = Callable[[StepReport], None]
"""Called with each report. One with a method `close(status)` is closed at the end of the run with "finished",
"interrupted" or "failed". One with an attribute `stop_reason` that is not empty ends the run after this step, with a
final model as at its end."""


def objections(recipe: Recipe) -> list[str]:
    """Why the trackers that the recipe asks for cannot be used here, each with its remedy; imports none of them."""
    found = (tracker.objection(recipe) for tracker in (tensorboard, wandb, mlflow))
    return [problem for problem in found if problem is not None]


class Callback:
    """A watcher of the user's: an error in it stops the run, as a TrainingError that names it.

    Errors of training_hub pass as they are, so that a callback can stop a run with one.
    """

    def __init__(self, watcher: Watcher):
        self._watcher = watcher
        self.name = _name(watcher)

    def __call__(self, report: StepReport) -> None:
        try:
            self._watcher(report)
        except HubError:
            raise
        except Exception as error:
            raise TrainingError(
                f"callback {self.name} raised {type(error).__name__} at step {report.step}: {error}. The run stops, "
                "since what the callback was to do was not done; repair or remove it."
            ) from error

    @property
    def stop_reason(self) -> str:
        return str(getattr(self._watcher, "stop_reason", "") or "")

    def close(self, status: str) -> None:
        close = getattr(self._watcher, "close", None)
        if callable(close):
            close(status)


def asked_to_stop(watchers: Sequence[Watcher]) -> str:
    """Why one of the watchers wants the run to end, "" where none does."""
    return next((reason for one in watchers if (reason := getattr(one, "stop_reason", ""))), "")


@contextmanager
def open_watchers(
    recipe: Recipe, run_folder: Path, console: Console, resume_step: int = 0, callbacks: Sequence[Watcher] = ()
) -> Iterator[list[Watcher]]:
    """The watchers that `recipe` asks for and the user's `callbacks`, to be called in this order with each report.

    metrics.jsonl in `run_folder`, the step line on `console`, trackers, the user's. All are closed at the end; an error
    in closing one is said on the console and given as a RuntimeWarning, and takes neither the others' closing nor
    the run's own result or error away. Raises RecipeError for a tracker that is not installed.
    """
    problems = objections(recipe)
    if problems:
        raise RecipeError(problems)
    opened: list[Watcher] = []
    status = "failed"
    try:
        for open_one in _openers(recipe, run_folder, console, resume_step):
            opened.append(open_one())
        opened += [Callback(callback) for callback in callbacks]
        yield opened
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        _close_all(opened, status, console)


def _openers(recipe: Recipe, run_folder: Path, console: Console, resume_step: int) -> Iterator[Callable[[], Watcher]]:
    asked = recipe.monitoring
    yield lambda: MetricsFile(run_folder / FILE_NAME, resume_step)
    steps = step_watcher(asked.console, console, asked.log_interval)
    if steps is not None:
        yield lambda: steps
    if asked.tensorboard is not False:
        yield lambda: tensorboard.TensorBoardFiles(recipe, run_folder, resume_step)
    if asked.wandb:
        yield lambda: wandb.WandbRun(recipe, run_folder, resume_step)
    if asked.mlflow:
        yield lambda: mlflow.MlflowRun(recipe, run_folder, console, resume_step)


def _close_all(watchers: Sequence[Watcher], status: str, console: Console) -> None:
    for watcher in watchers:
        close = getattr(watcher, "close", None)
        if not callable(close):
            continue
        try:
            close(status)
        except Exception as error:
            line = f"{_name(watcher)} could not be closed ({type(error).__name__}: {error}); it may lack the last steps"
            console.say(line)
            # A console that is off says nothing, and this must be seen.
            warnings.warn(line, RuntimeWarning, stacklevel=2)


def _name(watcher: Any) -> str:
    own = watcher.name if isinstance(watcher, Callback) else None
    return str(own or getattr(watcher, "__qualname__", None) or type(watcher).__qualname__)
