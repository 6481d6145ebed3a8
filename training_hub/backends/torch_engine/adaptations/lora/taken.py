"""What PiSSA and OLoRA take while they begin, from shapes: for the plan of a run."""

# M rows, N columns, K the shorter of these

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from training_hub.backends.torch_engine.adaptations.holdings import Beginning
from training_hub.backends.torch_engine.adaptations.lora.configs import is_changing_its_base
from training_hub.backends.torch_engine.adaptations.lora.files import ADAPTER


def beginning_of(model: nn.Module, config: Any) -> Beginning:
    """What there is while the adapter in the model is made, where it begins as a part of the weights."""
    if not is_changing_its_base(config):
        return Beginning()
    adapted: list[Any] = [module for module in model.modules() if ADAPTER in getattr(module, "lora_A", ())]
    takes = []
    for module in adapted:
        rows, columns = module.get_base_layer().weight.shape
        takes.append(Beginning(rows * columns, scratch_bytes(rows, columns, config.init_lora_weights)))
    most = max(takes, key=lambda one: one.scratch, default=Beginning())
    return replace(most, waiting=sum(one.whole for one in takes))


def scratch_bytes(rows: int, columns: int, begun: str) -> int:
    """Bytes that come and go while a matrix in float32 is decomposed, beside it: by "pissa" a copy of it, both of its
    bases, and what LAPACK asks for besides (gesdd: about 4 K^2 numbers); by "olora" the same without that; by a few
    products with random vectors what is left of it, twice."""
    shorter = min(rows, columns)
    if begun not in ("pissa", "olora"):
        return 8 * rows * columns
    bases = 4 * (rows * columns + shorter * (rows + columns))
    return bases + (16 * shorter**2 if begun == "pissa" else 0)
