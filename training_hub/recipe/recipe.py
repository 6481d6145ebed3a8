"""The recipe: everything that decides what a run does, in one frozen record."""

from __future__ import annotations

from pydantic import Field

from training_hub.recipe.sections import (
    Checkpoint,
    Data,
    Evaluation,
    Index,
    LRScheduler,
    Model,
    Monitoring,
    Optimizer,
    Processes,
    Section,
    Training,
)


class Recipe(Section):
    """One run. Saved as recipe.yaml in the run folder and beside every checkpoint; YAML and back is exact."""

    algorithm: str = "sft"
    """What is learned and what may move: sft."""

    backend: str = "torch"
    """Engine, or the name of a package whose parameters and defaults are to hold."""

    output: str
    """Folder of the run: recipe, metrics, checkpoints and the final model."""

    seed: Index = 42
    """Start of every random choice: order of the rows, dropout, new weights."""

    model: Model
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = Field(default_factory=LRScheduler)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    monitoring: Monitoring = Field(default_factory=Monitoring)
    processes: Processes = Field(default_factory=Processes)
