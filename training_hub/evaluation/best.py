"""Which evaluation of a run was best, and whether the last ones have brought nothing more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training_hub.recipe.evaluation import Evaluation, lower_is_better


@dataclass
class Best:
    """The best value of a metric and its step so far.

    mark: what an evaluation has to be better than, by more than min_delta, to end the waiting; it moves with every one
    that is. waited: evaluations since then.
    """

    settings: Evaluation
    value: float | None = None
    step: int | None = None
    mark: float | None = None
    waited: int = 0

    def note(self, values: Mapping[str, float], step: int) -> bool:
        """Take in the values measured at `step`, by name; whether it is the best so far. NaN never is."""
        value = values[self.settings.best_metric]
        is_best = self._gain(value, self.value) > 0
        if is_best:
            self.value, self.step = value, step
        if self._gain(value, self.mark) > self.settings.early_stopping_min_delta:
            self.mark, self.waited = value, 0
        else:
            self.waited += 1
        return is_best

    @property
    def reason(self) -> str:
        """Why the run is to stop, "" while it is not."""
        patience, name = self.settings.early_stopping_patience, self.settings.best_metric
        if patience is None or self.waited < patience:
            return ""
        best = f"the best is {self.value:.4f} at step {self.step}" if self.value is not None else "none was finite"
        return (
            f"evaluation.early_stopping_patience: {self.waited} evaluations in a row brought no better {name}; {best}"
        )

    def _gain(self, value: float, over: float | None) -> float:
        if math.isnan(value):
            return -math.inf
        if over is None:
            return math.inf
        return over - value if lower_is_better(self.settings) else value - over

    def state(self) -> dict[str, Any]:
        """What a checkpoint notes of it: numbers that are not finite are none."""
        marks = {name: getattr(self, name) for name in ("value", "mark")}
        finite = {name: mark if mark is not None and math.isfinite(mark) else None for name, mark in marks.items()}
        return {"metric": self.settings.best_metric, "step": self.step, "waited": self.waited, **finite}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint noted, unless it was about another metric."""
        if state.get("metric") == self.settings.best_metric:
            self.value, self.step, self.mark = state["value"], state["step"], state["mark"]
            self.waited = state["waited"]
