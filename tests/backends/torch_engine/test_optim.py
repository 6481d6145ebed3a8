"""The optimizer owns precision: small steps move bfloat16 weights, and clipping and decay are torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training_hub.backends.torch_engine.fused.products import holder_of
from training_hub.backends.torch_engine.optim import ARGUMENTS, Masters, Updater
from training_hub.recipe.sections import Optimizer


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def learn(model: nn.Module, updater: Updater, steps: int, rate: float, micro_steps: int = 1) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        dtype = next(model.parameters()).dtype
        inputs = torch.randn(4 * micro_steps, 8).to(dtype)  # drawn as bfloat16 they may be others
        for part in inputs.chunk(micro_steps):
            (model(part).square().sum() / len(inputs)).backward()
        updater.clip()
        updater.step(rate)


def test_a_learning_rate_of_1e_6_moves_bfloat16_weights_as_it_moves_float32_ones():
    low, full = network(torch.bfloat16), network(torch.bfloat16).float()
    settings = Optimizer(name="AdamW", lr=1e-6)
    low_updater = Updater(Masters(low.named_parameters()), settings, max_norm=0)
    full_updater = Updater(Masters(full.named_parameters()), settings, max_norm=0)
    before = {name: weight.clone() for name, weight in low_updater.masters.weights.items()}
    learn(low, low_updater, 50, 1e-6)
    learn(full, full_updater, 50, 1e-6)
    for name, weight in low_updater.masters.weights.items():
        moved, wanted = weight - before[name], full_updater.masters.weights[name] - before[name]
        assert (moved.abs() > 0).all()
        # 50 steps of 1e-6: the signs of Adam's steps agree but where bfloat16 gradients are near zero.
        assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.9


def test_bfloat16_weights_are_always_the_rounding_of_their_masters():
    model = network(torch.bfloat16)
    updater = Updater(Masters(model.named_parameters()), Optimizer(), max_norm=1.0)
    learn(model, updater, 3, 1e-2)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, updater.masters.weights[name].to(torch.bfloat16))


def test_micro_steps_add_up_in_float32_also_for_bfloat16_weights():
    # 256 + 1 is 256 in bfloat16: eight gradients of 1 after one of 256 vanish where they are summed in bfloat16.
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters([("weight", parameter)])
    (parameter * 256).sum().backward()
    for _ in range(8):
        parameter.sum().backward()
    assert masters.weights["weight"].grad.item() == 264
    assert parameter.grad is None


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_each_optimizer_is_torchs_own_and_reduces_the_loss(name):
    model = network()
    reference = copy.deepcopy(model)
    settings = Optimizer(name=name, lr=1e-2)
    learn(model, Updater(Masters(model.named_parameters()), settings, max_norm=0), 5, 1e-2)
    plain = getattr(torch.optim, name)(reference.parameters(), lr=1e-2, **ARGUMENTS[name](settings), weight_decay=0.0)
    for step in range(5):
        torch.manual_seed(step)
        plain.zero_grad()
        (reference(torch.randn(4, 8)).square().sum() / 4).backward()
        plain.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # Fused and plain kernels differ by the order of a few float32 operations.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_weight_decay_shrinks_matrices_and_leaves_biases_alone():
    model = network()
    updater = Updater(Masters(model.named_parameters()), Optimizer(weight_decay=0.5), max_norm=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    updater.step(0.1)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_clipping_reports_the_norm_before_and_leaves_the_norm_asked_for():
    parameter = nn.Parameter(torch.zeros(2))
    updater = Updater(Masters([("w", parameter)]), Optimizer(), max_norm=1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert updater.clip().item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    unclipped = Updater(Masters([("w", parameter)]), Optimizer(), max_norm=0)
    parameter.grad = torch.tensor([3.0, 4.0])
    assert unclipped.clip().item() == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_saved_and_loaded_state_goes_on_bit_for_bit(name, dtype):
    settings = Optimizer(name=name, lr=1e-3, weight_decay=0.1, momentum=0.9 if name == "SGD" else 0.0)
    model = network(dtype)
    updater = Updater(Masters(model.named_parameters()), settings, max_norm=1.0)
    learn(model, updater, 3, 1e-3)
    weights = {key: value.detach().clone() for key, value in updater.masters.weights.items()}
    state = {key: value.clone() for key, value in updater.state().items()}

    other = network(dtype)
    resumed = Updater(Masters(other.named_parameters()), settings, max_norm=1.0)
    resumed.masters.load(weights)
    resumed.load_state(state)
    learn(model, updater, 3, 1e-3)
    learn(other, resumed, 3, 1e-3)
    for key, value in updater.masters.weights.items():
        assert torch.equal(value, resumed.masters.weights[key])


@pytest.mark.parametrize("are_split", [False, True])
def test_released_parameters_have_their_own_gradients_again(are_split: bool):
    model = network(torch.bfloat16)
    masters = Masters(model.named_parameters(), are_split=are_split)
    masters.release()
    model(torch.randn(4, 8, dtype=torch.bfloat16)).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters()
    )
    assert all(holder_of(parameter) is None for parameter in model.parameters())
