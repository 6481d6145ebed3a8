"""The line about the step: live on a terminal, spaced lines elsewhere, or as torchforge writes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from training_hub.monitoring.console import Clock, SilentConsole, TerminalConsole
from training_hub.monitoring.words import duration, rate
from training_hub.types import Console, StepReport

BETWEEN_LINES_SECONDS = 1.0


def step_line(report: StepReport) -> str:
    """All that is known of a step, in one line."""
    parts = [
        f"step {report.step}/{report.total_steps}",
        f"epoch {report.epoch:.2f}",
        f"loss {report.loss:.4f}" + (" (skipped)" if report.skipped else ""),
        f"lr {report.learning_rate:.2e}",
        f"grad norm {report.grad_norm:.3g}",
        _speed(report),
        f"{report.memory_gib:.2f} GiB",
    ]
    if report.step < report.total_steps:
        parts.append(f"{duration(report.seconds_left)} left")
    return "  ".join(parts)


def _speed(report: StepReport) -> str:
    """'12.3k tokens/s (3.10k trained), 31 % of peak'."""
    line = f"{rate(report.tokens_per_second)} tokens/s ({rate(report.trained_tokens_per_second)} trained)"
    return line if report.peak_fraction is None else f"{line}, {report.peak_fraction:.0%} of peak"


def titan_line(report: StepReport) -> str:
    """'1 / 1000|Loss: 3.245', as torchforge's SFT app logs a step."""
    return f"{report.step} / {report.total_steps}|Loss: {report.loss:.3f}"


def validation_line(report: StepReport) -> str | None:
    """The validation measured at this step, None where there was none."""
    if report.validation_loss is None:
        return None
    line = f"validation at step {report.step}: loss {report.validation_loss:.4f}"
    if report.validation_perplexity is not None:
        line = f"{line}, perplexity {report.validation_perplexity:.4g}"
    return ", ".join([line, *(f"{name} {value:.4g}" for name, value in report.scores.items())])


def is_due(report: StepReport, interval: int) -> bool:
    """Whether a watcher that looks every `interval` steps looks now: also at the first and last, and at validations."""
    ends = report.step in (1, report.total_steps)
    return ends or report.step % interval == 0 or report.validation_loss is not None


class StepLines:
    """A watcher that says a line every `interval` steps, with at least `pause` seconds between two.

    The first and the last step and every validation are always said. Step 0 is the validation before training.
    """

    def __init__(
        self,
        console: Console,
        *,
        interval: int = 1,
        pause: float = BETWEEN_LINES_SECONDS,
        line: Callable[[StepReport], str] = step_line,
        clock: Clock = time.monotonic,
    ):
        self._console, self._interval, self._pause = console, interval, pause
        self._line, self._clock = line, clock
        self._last_said = -math.inf
        self._unsaid: StepReport | None = None

    def __call__(self, report: StepReport) -> None:
        self._unsaid = report
        if report.step > 0 and self._wants(report):
            self._say(report)
        measured = validation_line(report)
        if measured is not None:
            self._console.say(measured)

    def close(self, status: str = "finished") -> None:
        """Say the last step if it was not said: a run that stops early still shows where."""
        if self._unsaid is not None and self._unsaid.step > 0:
            self._say(self._unsaid)

    def _wants(self, report: StepReport) -> bool:
        if self._last_said == -math.inf or report.step >= report.total_steps or report.validation_loss is not None:
            return True
        return report.step % self._interval == 0 and self._clock() - self._last_said >= self._pause

    def _say(self, report: StepReport) -> None:
        self._console.say(self._line(report))
        self._last_said = self._clock()
        self._unsaid = None


class LiveStep:
    """A watcher that keeps one line about the step standing on a terminal; validations and the last step scroll up."""

    def __init__(self, console: TerminalConsole, *, interval: int = 1):
        self._console, self._interval = console, interval
        self._last: StepReport | None = None

    def __call__(self, report: StepReport) -> None:
        measured = validation_line(report)
        if measured is not None:
            self._console.say(measured)
        if report.step > 0:
            if self._last is None or is_due(report, self._interval):
                self._console.show(step_line(report))
            self._last = report

    def close(self, status: str = "finished") -> None:
        self._console.show(None)
        if self._last is not None:
            self._console.say(step_line(self._last))


def step_watcher(style: str, console: Console, interval: int) -> StepLines | LiveStep | None:
    """The watcher that shows steps on `console` in `style` (a value of monitoring.console), None where none does."""
    if isinstance(console, SilentConsole) or style == "off":
        return None
    if style == "titan":
        # Tools read these lines step by step: none is left out for being soon after another.
        return StepLines(console, interval=interval, pause=0.0, line=titan_line)
    if isinstance(console, TerminalConsole):
        return LiveStep(console, interval=interval)
    return StepLines(console, interval=interval)
