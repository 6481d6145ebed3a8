"""The decompositions of a run divided over its processes by what they cost, each made once and handed to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.targets import Target
from training_hub.backends.torch_engine.layouts import Layout


def collected(mine: Mapping[str, Split], targets: Sequence[Target], layout: Layout) -> dict[str, Split]:
    """The splits of all `targets` of this process, from the one that made each among those with the same layers; the
    same bits in all of these. All processes of the run must call it."""
    if layout.group.world_size == 1:
        return dict(mine)
    shapes = {name: {key: list(t.shape) for key, t in one.tensors().items()} for name, one in mine.items()}
    known = {name: each for said in layout.group.gather(shapes) for name, each in said.items()}
    found, device = {}, layout.device
    for target in targets:
        dtype = torch.float64 if target.parameter.dtype == torch.float64 else torch.float32
        own = mine[target.name].tensors() if target.name in mine else {}
        parts = {}
        for field in fields(Split):
            # Of a sum in which all but one are 0, every bit is that one's.
            part = own.get(field.name)
            part = part if part is not None else torch.zeros(known[target.name][field.name], dtype=dtype, device=device)
            parts[field.name] = layout.sum_alike(part) if part.numel() else part
        found[target.name] = Split(**parts)
    return found
