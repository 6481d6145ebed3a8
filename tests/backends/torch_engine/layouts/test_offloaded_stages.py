"""Stages whose weights are kept in the host's memory, beside a GPU."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from training_hub.backends.torch_engine.layouts.pipeline import _Part, _Work


def test_weights_stay_where_they_are_kept_when_torch_moves_a_stage_to_its_device():
    model, nothing = nn.Linear(2, 2), cast(Any, None)
    part = _Part(_Work(model, nothing, nothing, [], 0, None, nothing), 0)
    assert part.to("meta") is part
    assert model.weight.device.type == "cpu"
