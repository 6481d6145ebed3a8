"""What a model in stages says to prompts that are asked together."""

from __future__ import annotations

import torch

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.answers.generate import can_pad, serving
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.parallel import Group
from training_hub.recipe.parallelism import Parallelism


def pads(group: Group, family: str) -> bool:
    """Whether it says behind padding what it says without, so that prompts of several lengths are asked at once."""
    model = tiny_model(family)
    asked = Parallelism(pipeline_parallel_degree=group.world_size)
    layout_of(asked, group, torch.device("cpu")).divide(model, torch.float32)
    with serving(model):
        return can_pad(model)
