"""Each update rule moves weights as torch's does, and is named in checkpoints as torch names it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from training_hub.backends.jax_engine.optim import RULES, Updater
from training_hub.backends.torch_engine.optim import Masters
from training_hub.backends.torch_engine.optim import Updater as TorchUpdater
from training_hub.recipe.sections import Optimizer

SETTINGS = {
    "AdamW": {"weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9},
    "RMSprop": {"weight_decay": 0.1, "momentum": 0.5},
    "Lion": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("name", RULES)
def test_ten_steps_are_those_of_torch(name):
    """1e-6 of the largest weight, in float32, with decay and clipping; the state to 1e-6 of its largest number."""
    random = np.random.default_rng(0)
    settings = Optimizer(name=name, lr=1e-2, **SETTINGS[name])
    before = {"matrix": random.standard_normal((6, 5)).astype(np.float32), "norm": np.ones(5, np.float32)}
    theirs = {key: torch.nn.Parameter(torch.from_numpy(one.copy())) for key, one in before.items()}
    torch_updater = TorchUpdater(Masters(theirs.items()), settings, max_norm=1.0)
    updater = Updater(settings, 1.0)
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
        assert np.abs(np.asarray(ours[key]) - weight.detach().numpy()).max() <= 1e-6
    saved, kept = updater.named(state, 10), torch_updater.state()
    assert saved.keys() == {key for key in kept if not key.startswith("@")}
    for key in saved:
        assert np.abs(saved[key] - kept[key].numpy()).max() <= 1e-6 * max(1.0, np.abs(saved[key]).max())
    again = updater.named(updater.like(updater.begin(ours), saved), 10)
    assert all(np.array_equal(again[key], saved[key]) for key in saved)
