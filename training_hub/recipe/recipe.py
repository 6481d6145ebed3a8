"""The recipe: everything that decides what a run does, in one frozen record."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, model_validator

from training_hub.recipe.check import contradictions
from training_hub.recipe.comm import Comm
from training_hub.recipe.distillation import Distillation
from training_hub.recipe.evaluation import Evaluation
from training_hub.recipe.findings import Names
from training_hub.recipe.freezing import Freezing
from training_hub.recipe.hub import Hub
from training_hub.recipe.lora import Lora
from training_hub.recipe.loss import Loss
from training_hub.recipe.osft import Osft
from training_hub.recipe.parallelism import Parallelism
from training_hub.recipe.qat import Qat
from training_hub.recipe.sections import (
    Checkpoint,
    Data,
    Index,
    LRScheduler,
    Model,
    Monitoring,
    Optimizer,
    Processes,
    Section,
    Training,
)

# Validation context of recipe.load, which tells contradictions itself: with the rest, in the caller's words.
TOLD_BY_CALLER = object()


class Recipe(Section):
    """One run. Saved as recipe.yaml in the run folder and beside every checkpoint; YAML and back is exact.

    A recipe that exists is valid: settings at odds with each other are refused here as well as in `recipe.load`.
    """

    algorithm: str = "sft"
    """What is learned and what may move: sft, osft, lora_sft."""

    backend: str = "torch"
    """Engine, or the name of a package whose parameters and defaults are to hold."""

    output: str
    """Folder of the run: recipe, metrics, checkpoints and the final model."""

    seed: Index = 42
    """Start of every random choice: order of the rows, dropout, new weights."""

    model: Model
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    loss: Loss = Field(default_factory=Loss)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = Field(default_factory=LRScheduler)
    osft: Osft = Field(default_factory=Osft)
    lora: Lora = Field(default_factory=Lora)
    qat: Qat = Field(default_factory=Qat)
    freezing: Freezing = Field(default_factory=Freezing)
    distillation: Distillation = Field(default_factory=Distillation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    monitoring: Monitoring = Field(default_factory=Monitoring)
    processes: Processes = Field(default_factory=Processes)
    parallelism: Parallelism = Field(default_factory=Parallelism)
    comm: Comm = Field(default_factory=Comm)
    hub: Hub = Field(default_factory=Hub)

    @model_validator(mode="after")
    def _refuse_contradictions(self, info: ValidationInfo) -> Recipe:
        if info.context is not TOLD_BY_CALLER:
            found = contradictions(self, Names())
            if found:
                raise ValueError("\n".join(one.message for one in found))
        return self
