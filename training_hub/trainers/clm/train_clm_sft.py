"""`CustomSFTTrainer`, where AutoTrain has it."""

from __future__ import annotations

from training_hub.frontends.autotrain.trainer import CustomSFTTrainer

__all__ = ["CustomSFTTrainer"]
