"""The records that flow from a row of data to a result: numpy and plain types only.

    row -> Conversation | Text | Tokens -> Sample -> Pack -> Batch -> StepReport -> TrainResult

Every record is frozen: a stage reads what the one before it made and never changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from. `line` counts from 1: the line in a text file, the row elsewhere."""

    source: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.source} {self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `content` is text, or None for a turn that only calls tools. `train` overrides what is trained by role:
    False or 0.0 leaves the turn out, True or 1.0 trains it, another number weights its tokens.
    """

    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    train: float | None = None

    def as_template_input(self) -> dict[str, Any]:
        """The dictionary a chat template reads: only the keys that are set, `content` always."""
        shown: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content is not None:
            shown["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            shown["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            shown["name"] = self.name
        if self.tool_call_id is not None:
            shown["tool_call_id"] = self.tool_call_id
        return shown


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be rendered by a chat template.

    `unmask` trains every role but system. `weight` multiplies every trained token of the row.
    """

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    unmask: bool = False
    weight: float = 1.0
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """Text that no template touches: segments of (text, weight of its tokens), joined without a separator.

    Plain text is one segment of weight 1; prompt and completion are (prompt, 0) and (completion, 1).
    `ends` says whether an end-of-sequence token, trained like the last segment, closes the row; `begins` whether what
    the tokenizer puts in front of a text by itself opens it.
    """

    segments: tuple[tuple[str, float], ...]
    origin: Origin
    ends: bool = True
    begins: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row that is tokenised already: `ids` [T] int32 and `weights` [T] float32, weights[t] for predicting ids[t]."""

    ids: np.ndarray
    weights: np.ndarray
    origin: Origin


Row = Conversation | Text | Tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: `ids` [T] int32 and `weights` [T] float32.

    weights[t] is the weight of the loss of predicting ids[t] from ids[:t]; weights[0] is 0, since nothing predicts it.
    """

    ids: np.ndarray
    weights: np.ndarray
    origin: Origin

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples laid end to end, to be run through the model as one row that keeps them apart.

    ids [T] int32, positions [T] int32 (restart at 0 for each sample), weights [T] float32,
    boundaries [n+1] int32 (sample i is boundaries[i]:boundaries[i+1]), samples [n] int64 (index in the token store).
    """

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    boundaries: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one optimizer step learns from.

    `step` counts from 1. `trained_weight` is the sum of all weights of the step: what the loss is divided by.
    """

    step: int
    epoch: float
    packs: tuple[Pack, ...]
    num_samples: int
    num_tokens: int
    num_trained_tokens: int
    trained_weight: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """What happened in one optimizer step; all that watchers ever see.

    `loss` is the mean over the trained tokens of the step, in nats. `memory_gib` is the peak so far. `tokens` are those
    of samples, padding is none; `step_seconds` goes from asking for the batch to the end of the update.
    `peak_fraction`: operations that the step needed, over those that matrix products could have done in its time at the
    rate measured at the start; None where none was measured.
    `validation_loss` is set on the steps at which the validation set was measured, `scores` where it was also answered:
    the scores of the answers by name. `measures`: what the adaptation measures of its own after the update, and what
    the watch found, by name.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    samples: int
    tokens_per_second: float
    step_seconds: float
    memory_gib: float
    seconds_left: float
    validation_loss: float | None = None
    validation_perplexity: float | None = None
    skipped: bool = False
    time: float = 0.0
    peak_fraction: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def trained_tokens_per_second(self) -> float:
        """Only the tokens that have a loss."""
        return self.trained_tokens / self.step_seconds if self.step_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim about a run, tried on its own model and data before the first step.

    status: "holds", "fails", "fallback" (the claim does not hold, and the run takes a slower way on which it need not),
    or "left out" (it could not be tried; `remedy` says why). measured and limit: what was found and what is allowed.
    remedy: what to do where it fails.
    """

    name: str
    status: str
    measured: str
    limit: str
    remedy: str = ""


@dataclass(frozen=True)
class TrainResult:
    """What a run returns.

    status: "finished" (or "already finished", when the output folder held this very run); "stopped" where
    evaluation.watch_limit or early_stopping_patience ended the run, and `reason` then says why.
    output_dir: the run folder. model_path: the Hugging Face folder to load, None when no final model was asked for.
    metrics: the last values by name. history: one dictionary per logged step, as in metrics.jsonl.
    plan: what was decided before the first step. engine: the engine that ran. versions: of the packages that matter.
    base: name and licence of the model it began from. data: counts and fingerprint of the rows. predictions: the file
    with the answers, where rows were answered. hub: the address of the upload, empty where there was none.
    """

    status: str
    output_dir: Path
    model_path: Path | None
    checkpoints: tuple[Path, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    plan: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    base: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    predictions: Path | None = None
    hub: str = ""


class Progress(Protocol):
    """How slow work shows itself: `with progress("tokenising", total=n, unit="rows") as advance: advance(100)`.

    `total` is None where the end is not known. On a terminal a bar with rate and time left, elsewhere plain lines.
    """

    def __call__(
        self, what: str, total: float | None = None, unit: str = "rows"
    ) -> AbstractContextManager[Callable[[float], None]]: ...


class Console(Protocol):
    """Where a run speaks: `say` prints one line, `progress` shows slow work."""

    @property
    def progress(self) -> Progress: ...

    def say(self, line: str) -> None: ...
