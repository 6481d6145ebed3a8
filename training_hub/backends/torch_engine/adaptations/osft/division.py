"""The decompositions of a run divided over its processes by what they cost, each made once and handed to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.targets import Target
from training_hub.backends.torch_engine.parallel import Group


def collected(mine: Mapping[str, Split], targets: Sequence[Target], group: Group) -> dict[str, Split]:
    """The splits of all targets, from the process that made each; the same bits in all processes."""
    if group.world_size == 1:
        return dict(mine)
    shapes = {name: {key: list(t.shape) for key, t in one.tensors().items()} for name, one in mine.items()}
    known = {name: each for said in group.gather(shapes) for name, each in said.items()}
    found = {}
    for target in targets:
        like = target.parameter
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        own = mine[target.name].tensors() if target.name in mine else {}
        parts = {}
        for field in fields(Split):
            # Of a sum in which all but one are 0, every bit is that one's.
            part = own.get(field.name)
            part = part if part is not None else like.new_zeros(known[target.name][field.name], dtype=dtype)
            parts[field.name] = group.sum(part) if part.numel() else part
        found[target.name] = Split(**parts)
    return found
