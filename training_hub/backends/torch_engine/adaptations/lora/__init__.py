"""Adapters beside frozen weights: LoRA and its kin, through PEFT."""

from __future__ import annotations

from training_hub.backends.torch_engine.adaptations.lora.adaptation import Lora
from training_hub.backends.torch_engine.adaptations.lora.configs import problems

__all__ = ["Lora", "problems"]
