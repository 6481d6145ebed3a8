"""Each update rule moves weights as torch's does, and is named in checkpoints as torch names it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from training_hub.backends.jax_engine.beforehand import kept_numbers
from training_hub.backends.jax_engine.optim import STEP, Updater
from training_hub.backends.jax_engine.refusals import OPTIMIZERS
from training_hub.backends.jax_engine.rules import RULES
from training_hub.backends.torch_engine.optim import Masters
from training_hub.backends.torch_engine.optim import Updater as TorchUpdater
from training_hub.recipe.sections import Optimizer

MOMENTUM = {"SGD": 0.9, "RMSprop": 0.5}
SETTINGS = {name: {"weight_decay": 0.1, "momentum": MOMENTUM.get(name)} for name in RULES}
TABLES = frozenset({"table"})

APART = {"Muon": 2e-3}
"""Muon's matrices are rounded to bfloat16 in another order of sums: a hundredth of what ten steps move."""


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"matrix": (6, 5), "wide": (3, 8), "table": (7, 5)}
    drawn = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**drawn, "norm": np.ones(5, np.float32)}


def test_every_rule_is_one_that_the_engine_takes():
    assert set(RULES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", RULES)
def test_ten_steps_are_those_of_torch(name):
    """1e-6 of the largest weight, in float32, with decay and clipping; the state to 1e-6 of its largest number."""
    random, limit = np.random.default_rng(1), APART.get(name, 1e-6)
    settings = Optimizer(name=name, lr=1e-2, **SETTINGS[name])
    before = weights()
    theirs = {key: torch.nn.Parameter(torch.from_numpy(one.copy())) for key, one in before.items()}
    torch_updater = TorchUpdater(Masters(theirs.items()), settings, max_norm=1.0, tables=TABLES)
    updater = Updater(settings, 1.0, tables=TABLES)
    ours = {key: jnp.asarray(one) for key, one in before.items()}
    state = updater.begin(ours)
    for step in range(1, 11):
        slopes = {key: random.standard_normal(one.shape).astype(np.float32) for key, one in before.items()}
        for key, weight in theirs.items():
            weight.grad = torch.from_numpy(slopes[key] / 4)
        wanted = torch_updater.clip()
        torch_updater.step(settings.lr / step)
        gradients = {key: jnp.asarray(one) for key, one in slopes.items()}
        norm = updater.norm(gradients, 4.0)
        assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
        ours, state = updater.step(ours, state, gradients, {}, norm, jnp.float32(4), jnp.float32(settings.lr / step))
    for key, weight in theirs.items():
        assert np.abs(np.asarray(ours[key]) - weight.detach().numpy()).max() <= limit, key
    saved, kept = updater.named(state, ours), torch_updater.state()
    assert saved.keys() == {key for key in kept if not key.startswith("@")}
    for key in saved:
        assert np.abs(saved[key] - kept[key].numpy()).max() <= 1e-6 * max(1.0, np.abs(saved[key]).max()), key
    again = updater.named(updater.like(updater.begin(ours), ours, saved), ours)
    assert all(np.array_equal(again[key], saved[key]) for key in saved)
    counted = sum(one.size for key, one in saved.items() if not key.endswith((f"/{STEP}", "/mu_product")))
    assert kept_numbers(settings, {key: one.shape for key, one in before.items()}, TABLES) == counted


def test_a_weight_that_begins_later_moves_as_if_it_had_just_begun():
    settings = Optimizer(name="AdamW", lr=1e-2)
    updater, before = Updater(settings, 0.0), {key: jnp.asarray(one) for key, one in weights().items()}
    slopes = {key: jnp.full_like(one, 0.5) for key, one in before.items()}

    def step(some, state):
        mine = {key: slopes[key] for key in some}
        some = {key: jnp.array(one) for key, one in some.items()}  # what is moved is given away
        return updater.step(some, state, mine, {}, jnp.float32(0), jnp.float32(1), jnp.float32(1e-2))

    alone, _ = step({"table": before["table"]}, updater.begin({"table": before["table"]}))
    moved, state = step({"norm": before["norm"]}, updater.begin({"norm": before["norm"]}))
    both = {**moved, "table": before["table"]}
    together, state = step(both, {**state, **updater.begin({"table": before["table"]})})
    assert np.array_equal(together["table"], alone["table"])
    named = updater.named(state, together)
    assert (named["norm/step"], named["table/step"]) == (2, 1)
