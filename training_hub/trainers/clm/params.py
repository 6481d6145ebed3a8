"""`LLMTrainingParams`, where AutoTrain has it."""

from __future__ import annotations

from training_hub.frontends.autotrain.params import LLMTrainingParams

__all__ = ["LLMTrainingParams"]
