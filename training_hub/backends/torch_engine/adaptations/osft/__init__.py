"""OSFT: orthogonal subspace fine-tuning on dense weights."""

from __future__ import annotations

from training_hub.backends.torch_engine.adaptations.osft.adaptation import Osft
from training_hub.backends.torch_engine.adaptations.osft.optimizer import OsftOptimizer

__all__ = ["Osft", "OsftOptimizer"]
