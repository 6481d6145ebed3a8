"""Callbacks of transformers as watchers of a run: they hear of steps, logs, epochs and evaluations, and may end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from training_hub.errors import TrainingError
from training_hub.recipe.translate import shown

if TYPE_CHECKING:
    from training_hub.types import StepReport

HEARD = ("on_init_end", "on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_epoch_end", "on_train_end")
"""Events that a callback is told of. The first three of a run come with the report of its first step."""

WISHES = {
    "should_save": "save_steps or save_strategy",
    "should_evaluate": "eval_steps or eval_strategy",
    "should_log": "logging_steps",
    "should_epoch_stop": "max_steps",
}
"""What a callback may ask for through its control and cannot have, and the field that says it here."""


def is_callback(value: Any) -> bool:
    """Whether this is a callback of transformers, as an object or as a class of them."""
    kind = value if isinstance(value, type) else type(value)
    return any(one.__name__ == "TrainerCallback" and one.__module__.startswith("transformers") for one in kind.__mro__)


def problems_of(callbacks: Sequence[Any]) -> Iterator[str]:
    """What is wrong with callbacks: that they are none, or wait for events that do not come."""
    for one in callbacks:
        kind = one if isinstance(one, type) else type(one)
        if not is_callback(one):
            if not callable(one):
                yield (
                    f"callbacks: found {shown(one)}; allowed: callbacks of transformers, or functions that take a "
                    "StepReport."
                )
            continue
        plain = next(base for base in kind.__mro__ if base.__name__ == "TrainerCallback")
        unheard = [
            name
            for name in dir(kind)
            if name.startswith("on_") and name not in HEARD and getattr(kind, name) is not getattr(plain, name, None)
        ]
        if unheard:
            yield (
                f"callbacks: {kind.__name__} waits for {', '.join(unheard)}, which no run here tells of; heard are "
                f"{', '.join(HEARD)}. Take {'them' if len(unheard) > 1 else 'it'} out, or write a function that takes "
                "a StepReport."
            )


def watchers_of(callbacks: Sequence[Any], args: Any, log_interval: int, **live: Any) -> list[Callable[[Any], None]]:
    """A watcher for each callback; a function that takes reports stays as it is.

    args: the configuration that callbacks are shown. live: what they are given by name (model, processing_class).
    """
    made = [one() if isinstance(one, type) else one for one in callbacks]
    return [Listener(one, args, log_interval, live) if is_callback(one) else one for one in made]


class Listener:
    """A watcher that tells a callback of transformers what happens.

    stop_reason: why the run is to end, once the callback has asked for it.
    """

    def __init__(self, callback: Any, args: Any, log_interval: int, live: dict[str, Any]):
        from transformers import TrainerControl, TrainerState

        self._callback, self._args, self._log_interval, self._live = callback, args, log_interval, live
        self.name = type(callback).__name__
        self.stop_reason = ""
        self.state = TrainerState()
        self.state.log_history = []
        self._control = TrainerControl()
        self._has_begun = False

    def __call__(self, report: StepReport) -> None:
        state = self.state
        state.global_step, state.epoch, state.max_steps = report.step, report.epoch, report.total_steps
        if not self._has_begun:
            self._has_begun = True
            state.logging_steps = self._log_interval
            for event in ("on_init_end", "on_train_begin"):
                self._tell(event)
        self._tell("on_step_end")
        is_last = report.step == report.total_steps
        if report.step % self._log_interval == 0 or is_last:
            logs = logs_of(report)
            state.log_history.append({**logs, "step": report.step})
            self._tell("on_log", logs=logs)
        if report.validation_loss is not None:
            metrics = evaluation_of(report)
            state.log_history.append({**metrics, "step": report.step})
            self._tell("on_evaluate", metrics=metrics)
            self._note_best(metrics)
        if is_last or abs(report.epoch - round(report.epoch)) < 1e-9:
            self._tell("on_epoch_end")

    def close(self, status: str) -> None:
        """Tell of the end of a run that came to it."""
        if status == "finished" and self._has_begun:
            self._tell("on_train_end")

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Keep the best value of metric_for_best_model, which callbacks compare with; as in transformers after them."""
        name = self._args.metric_for_best_model or "loss"
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        best, is_more = self.state.best_metric, self._args.greater_is_better
        if is_more is None:
            is_more = not name.endswith("loss")
        if value is not None and (best is None or (value > best if is_more else value < best)):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def _tell(self, event: str, **facts: Any) -> None:
        answer = getattr(self._callback, event)(self._args, self.state, self._control, **self._live, **facts)
        control = self._control if answer is None else answer
        for wish, field in WISHES.items():
            if getattr(control, wish):
                raise TrainingError(
                    f"callback {self.name} set control.{wish} at step {self.state.global_step}, which is not had "
                    f"from a callback here. Write {field} in SFTConfig, and take it out."
                )
        if control.should_training_stop and not self.stop_reason:
            self.stop_reason = f"callback {self.name} ended it at step {self.state.global_step}"


def logs_of(report: StepReport) -> dict[str, float]:
    """A step in the words of transformers' logs."""
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "epoch": report.epoch,
    }


def evaluation_of(report: StepReport) -> dict[str, float]:
    """An evaluation in the words of transformers' metrics."""
    whole = {"eval_loss": report.validation_loss, "eval_perplexity": report.validation_perplexity}
    parts = {set_name(name): value for name, value in report.measures.items() if name.startswith("validation_loss/")}
    scores = {f"eval_{name}": value for name, value in report.scores.items()}
    found = {name: float(value) for name, value in whole.items() if value is not None}
    return {**found, **parts, **scores, "epoch": report.epoch}


def set_name(name: str) -> str:
    """validation_loss/NAME as transformers has it: eval_NAME_loss."""
    return f"eval_{name.partition('/')[2]}_loss"
