"""Layers are dealt out in stages of about equal size, or the settings are refused with what to write."""

from __future__ import annotations

import re
from typing import Any

import pytest

from training_hub.backends.torch_engine.layouts.stages import Stages, stages_of
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism


def stages(layers: int, degree: int, **settings: Any) -> Stages:
    named = {f"pipeline_parallel_{name}": value for name, value in {"degree": degree, **settings}.items()}
    return stages_of(Parallelism(**named), layers)


def sizes(found: Stages) -> list[int]:
    return [len(found.layers(stage)) for stage in range(len(found.ends))]


@pytest.mark.parametrize(
    ("layers", "degree", "settings", "wanted"),
    [
        (4, 2, {}, [2, 2]),
        (32, 4, {}, [8, 9, 8, 7]),
        (4, 4, {}, [1, 1, 1, 1]),
        (6, 2, {"first_stage_less_layers": 2, "last_stage_less_layers": 0}, [2, 4]),
        (8, 2, {"schedule": "Interleaved1F1B"}, [2, 3, 2, 1]),
        (8, 2, {"schedule": "Interleaved1F1B", "layers_per_stage": 2}, None),
        (10, 2, {"schedule": "Interleaved1F1B", "layers_per_stage": 2}, [1, 2, 2, 2, 2, 1]),
        (4, 2, {"first_stage_less_layers": 9}, [1, 3]),
    ],
)
def test_each_stage_has_its_share_of_the_layers(layers, degree, settings, wanted):
    if wanted is None:
        with pytest.raises(RecipeError):
            stages(layers, degree, **settings)
        return
    found = stages(layers, degree, **settings)
    assert sizes(found) == wanted
    owners = [found.owners[found.of_layer(number)] for number in range(layers)]
    assert sorted(set(owners)) == list(range(degree))
    assert sum(len(found.layers(one)) for place in range(degree) for one in found.of_process(place)) == layers


def test_stages_lie_over_and_over_or_there_and_back():
    assert stages(8, 2, schedule="Interleaved1F1B").owners == (0, 1, 0, 1)
    assert stages(8, 2, schedule="ZBVZeroBubble").owners == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("layers", "degree", "settings", "words"),
    [
        (4, 6, {}, "6 processes with 1 stages each are 6 stages, but the model has 4 layers. Write at most 4."),
        (2, 2, {"schedule": "ZBVZeroBubble"}, "are 4 stages, but the model has 2 layers. Write at most 1."),
        (1, 2, {"schedule": "ZBVZeroBubble"}, "Write parallelism.pipeline_parallel_schedule: 1F1B and at most 1."),
        (
            6,
            2,
            {"layers_per_stage": 2},
            "2 makes 4 stages of what counts for 8 layers, but 1F1B over 2 processes has 2. Write 4, or leave it out.",
        ),
        (
            6,
            2,
            {"layers_per_stage": 4, "schedule": "Interleaved1F1B"},
            "Interleaved1F1B over 2 processes has a multiple of 2 that is at least 4. Write 2, or leave it out.",
        ),
    ],
)
def test_what_does_not_make_stages_is_refused_with_what_to_write(layers, degree, settings, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        stages(layers, degree, **settings)
