"""A run in progress: its parts, and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from training_hub.backends.shared.exam import Exam
from training_hub.backends.shared.watch import Watch
from training_hub.backends.torch_engine.by_source import BySource
from training_hub.backends.torch_engine.freezing import Thaw
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.optim import Updater
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.planning.work import Scale
from training_hub.backends.torch_engine.profile import StepProfile
from training_hub.backends.torch_engine.recording import Recorder
from training_hub.backends.torch_engine.saving.checkpoints import Checkpoints
from training_hub.backends.torch_engine.saving.staging import Staging
from training_hub.backends.torch_engine.saving.writing import Writer
from training_hub.data.feed import Feed
from training_hub.data.store import TokenStore
from training_hub.evaluation.best import Best
from training_hub.recipe import Recipe
from training_hub.types import Console


@dataclass
class Run:
    """A run in progress: its parts, and the little that changes: the step it has reached, its best evaluation, and how
    many steps up to now were left out without a break; stop_reason is what a watcher of the user's ends it for.

    objective: what is minimised. plain: cross-entropy, by which validation and watch measure whatever is minimised.
    recorder: learns from packs in place of the layout, where they are replayed.
    staging: copies from which `writer` writes a checkpoint while training goes on; None where that stands still.
    """

    recipe: Recipe
    model: PreTrainedModel
    objective: Callable[..., Any]
    plain: Callable[..., Any]
    adaptation: Any
    updater: Updater
    feed: Feed
    validation: TokenStore | None
    checkpoints: Checkpoints
    device: torch.device
    console: Console
    facts: dict[str, Any]
    best: Best
    engine: str = "torch"
    step: int = 0
    skipped_in_row: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    staging: Staging | None = None
    writer: Writer = field(default_factory=Writer)
    validation_before: float | None = None
    watch: Watch | None = None
    exam: Exam | None = None
    scale: Scale | None = None
    profile: StepProfile | None = None
    by_source: BySource | None = None
    thaw: Thaw | None = None
    recorder: Recorder | None = None
    layout: Layout = WHOLE
    validation_sets: BySource | None = None
    packs_validation: bool = True
    stop_reason: str = ""

    @property
    def group(self) -> Group:
        """All processes of the run."""
        return self.layout.group
