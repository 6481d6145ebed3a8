"""The forgetting watch: rows that the run does not train, measured during it, which stop it when their loss rises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training_hub.data.feed import Feed
from training_hub.data.store import TokenStore
from training_hub.recipe.evaluation import Evaluation
from training_hub.types import Console


@dataclass
class Watch:
    """What is watched, and what was seen: the mean loss in nats per token before the first step and at the last look.

    kept: the last step found within the limit. reason: why the run was stopped, empty while it was not.
    """

    store: TokenStore
    settings: Evaluation
    measure: Callable[[TokenStore, str], float]
    before: float | None = None
    last: float | None = None
    kept: int | None = None
    reason: str = ""

    @property
    def drift(self) -> float:
        """By how much the loss has risen, in nats per token: the logarithm of how much the perplexity has grown."""
        return self.last - self.before if self.last is not None and self.before is not None else 0.0

    def begin(self, step: int, console: Console) -> None:
        """Measure what all later looks are compared with; `step` is where the run stands."""
        self.before = self.measure(self.store, "watch")
        console.say(f"watch before step {step + 1}: loss {self.before:.4f} on {self.settings.watch}")

    def is_due(self, step: int, feed: Feed) -> bool:
        interval = self.settings.watch_interval
        at_interval = feed.is_epoch_end(step) if interval is None else step % interval == 0
        return at_interval or step == feed.total_steps

    def look(self, step: int, console: Console) -> dict[str, float]:
        """Measure at `step`: watch_loss and watch_drift; notes the step, or why the run must stop after it."""
        self.last = self.measure(self.store, "watch")
        limit = self.settings.watch_limit
        line = f"watch at step {step}: loss {self.last:.4f}, {self.drift:+.4f} nats since the start"
        console.say(line if limit is None else f"{line}, of {limit:g} allowed")
        # A loss that is not a number is over the limit too.
        if limit is not None and self.drift <= limit:
            self.kept = step
        elif limit is not None:
            self.reason = self._over(step, limit)
        return {"watch_loss": self.last, "watch_drift": self.drift}

    def metrics(self) -> dict[str, float]:
        """The last values, for the result."""
        if self.before is None or self.last is None:
            return {}
        return {"watch_loss_before": self.before, "watch_loss": self.last, "watch_drift": self.drift}

    def state(self) -> dict[str, Any]:
        """What a checkpoint notes of it."""
        return {"before": self.before, "kept": self.kept}

    def load(self, state: Mapping[str, Any]) -> None:
        self.before, self.kept = state.get("before"), state.get("kept")

    def _over(self, step: int, limit: float) -> str:
        model = (
            "no earlier step was found within it, so there is no final model: the one the run began from is the best"
            if self.kept is None
            else f"the final model is that of step {self.kept}, the last one found within it"
        )
        return (
            f"evaluation.watch_limit: after step {step} the loss on {self.settings.watch} is {self.last:.4f}, "
            f"{self.drift:.4f} nats per token above the {self.before:.4f} before training; allowed: {limit:g}; "
            f"{model}. "
            "Train with a lower optimizer.lr, with osft, or allow more."
        )
