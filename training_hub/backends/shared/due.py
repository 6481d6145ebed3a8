"""When a run measures and when it saves: questions about the step that it has reached."""

from __future__ import annotations

import time
from typing import Protocol

from training_hub.data.feed import Feed
from training_hub.recipe import Recipe
from training_hub.types import StepReport


class Reached(Protocol):
    """A run as far as it has come. saved_at: when it last saved, by time.monotonic."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def feed(self) -> Feed: ...

    @property
    def step(self) -> int: ...

    @property
    def saved_at(self) -> float: ...


def is_evaluation_due(run: Reached) -> bool:
    settings = run.recipe.evaluation
    at_interval = settings.interval is not None and run.step % settings.interval == 0
    at_end = run.step == run.feed.total_steps
    return at_interval or at_end or (settings.at_epoch and run.feed.is_epoch_end(run.step))


def is_saving_due(run: Reached, is_watched: bool = False) -> bool:
    settings = run.recipe.checkpoint
    if is_watched and run.recipe.evaluation.watch_limit is not None:
        return True  # a run that is stopped later gives back the last step within the limit
    at_interval = settings.interval is not None and run.step % settings.interval == 0
    at_epoch = settings.at_epoch and run.feed.is_epoch_end(run.step)
    at_time = settings.minutes is not None and time.monotonic() - run.saved_at >= settings.minutes * 60
    return at_interval or at_epoch or at_time or is_at_samples(run, settings.save_samples)


def is_at_samples(run: Reached, every: int) -> bool:
    """Whether this step took the count of trained samples to or over another multiple of `every`."""
    if not every:
        return False
    after = samples_seen(run.feed, run.step)
    return after // every > samples_seen(run.feed, run.step - 1) // every


def samples_seen(feed: Feed, step: int) -> int:
    """Samples trained in the first `step` steps."""
    epochs, steps = divmod(step, feed.steps_per_epoch)
    return epochs * feed.samples_per_epoch + min(steps * feed.settings.samples_per_step, feed.samples_per_epoch)


def measured(report: StepReport) -> dict[str, float]:
    """What evaluation.best_metric may name, of a step that was evaluated."""
    loss, doubt = report.validation_loss, report.validation_perplexity
    return {**({"loss": loss, "perplexity": doubt} if loss is not None and doubt is not None else {}), **report.scores}
