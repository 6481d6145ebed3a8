"""AutoTrain's `train`: one run, or a sweep of them."""

from __future__ import annotations

from training_hub.frontends.autotrain.meaning import Name, asked
from training_hub.frontends.autotrain.params import LLMTrainingParams
from training_hub.frontends.autotrain.run import TrainedModel, run
from training_hub.frontends.autotrain.sweep import sweep


def train(config: LLMTrainingParams, write: Name = str) -> TrainedModel:
    """Train as `config` says, and give the model; of a sweep the best. Raises RecipeError that lists everything that is
    wrong.

    write: a parameter as its caller writes it, for errors.
    """
    if config.use_sweep:
        return sweep(config, write)
    return run(asked(config, write))
