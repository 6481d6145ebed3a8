"""Causal language models: `train`, and `params` and `train_clm_sft` beside it."""

from __future__ import annotations

from training_hub.frontends.autotrain.run import TrainedModel
from training_hub.frontends.autotrain.train import train

__all__ = ["TrainedModel", "train"]
