"""The paths of others: what AutoTrain's guide imports from `autotrain.trainers`, and EasyDeL's page from
`easydel.trainers`, is here under `training_hub.trainers`."""

from __future__ import annotations

from training_hub.frontends.trainer.config import SFTConfig
from training_hub.frontends.trainer.trainer import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer"]
