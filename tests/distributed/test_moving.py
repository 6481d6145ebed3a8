"""Optimizers move weights that lie in pieces as they move whole ones; those that want them whole, bit for bit."""

from __future__ import annotations

import pytest

from training_hub.backends.torch_engine.optimizers.library import find_spec

ELEMENTWISE = ["AdamW", "SGD", "Lion", "AdamWScheduleFree", "PagedAdamW"]
OF_WHOLE = ["Muon", "Adafactor", "GaLoreAdamW", "AdamW8bit", "Lion8bit", "PagedLion8bit"]
STATES = [{"name": "AdamW", "state": state} for state in ("split", "8bit")]
NEEDS = {"Lion": "lion_pytorch", "AdamWScheduleFree": "schedulefree", "GaLoreAdamW": "galore_torch"}


def is_here(name: str) -> bool:
    return find_spec(NEEDS.get(name, "bitsandbytes" if "8bit" in name or "Paged" in name else "torch")) is not None


ALL = [*({"name": name} for name in (*ELEMENTWISE, *OF_WHOLE) if is_here(name)), *STATES]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_make_the_steps_of_one(layout, dtype, two):
    for settings in ALL:
        assert two.call("tests.distributed.moving:apart", layout, dtype, settings) == [[], []], settings


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns", "replicas"])
def test_four_processes_make_them_too(layout, four):
    for settings in ALL:
        assert four.call("tests.distributed.moving:apart", layout, "float32", settings) == [[]] * 4, settings


def test_every_whole_weight_has_one_owner_and_owners_have_about_as_much(two):
    first, second = two.call("tests.distributed.moving:owned", {"name": "Muon"})
    assert sorted([*first, *second]) == ["blocks.odd", "blocks.wide"] and first and second
    assert two.call("tests.distributed.moving:owned", {"name": "Lion"}) == [[], []]
