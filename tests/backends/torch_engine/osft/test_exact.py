"""The dense run is the factored one: OsftOptimizer against an oracle that trains the factors themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.backends.torch_engine.osft.oracle import dense_weights, factored, step
from training_hub.backends.torch_engine.adaptations.osft.decompose import rank_kept, split
from training_hub.backends.torch_engine.adaptations.osft.optimizer import OsftOptimizer
from training_hub.backends.torch_engine.adaptations.osft.spaces import FORMS, leak_and_size

STEPS = 60
RATIO = 0.3


class Network(nn.Module):
    """Square, tall and wide layers in a row, and an embedding-like first layer that no cut touches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 40), nn.Linear(40, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def network(dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def loss_of(model: nn.Module, number: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    random = torch.Generator().manual_seed(number)
    x = torch.randn(12, 6, generator=random, dtype=torch.float64).to(dtype)
    y = torch.randn(12, 16, generator=random, dtype=torch.float64).to(dtype)
    return (model(x) - y).square().mean()


KEPT = {f"layers.{index}": rank_kept(16, RATIO) for index in range(3)}

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD with decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}),
    "AdamW with decay": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "Adam with decay": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("is_layerwise", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sixty_steps_in_float64_are_the_factored_run(name, max_norm, is_layerwise):
    kind, settings = OPTIMIZERS[name]
    dense, oracle = network(), factored(network(), KEPT)
    ours = OsftOptimizer(dense, kind, unfreeze_rank_ratio=RATIO, is_layerwise=is_layerwise, **settings)
    theirs = kind(oracle.parameters(), **settings)
    for number in range(STEPS):
        mine, wanted = loss_of(dense, number), loss_of(oracle, number)
        # Measured: 1e-15. Sums in another order are all that differs.
        assert mine.item() == pytest.approx(wanted.item(), rel=1e-12)
        mine.backward()
        wanted.backward()
        norm = ours.clip_grad_norm_(max_norm if max_norm is not None else float("inf"))
        assert norm.item() == pytest.approx(step(oracle, theirs, max_norm).item(), rel=1e-12)
        ours.step()
        ours.zero_grad()
    for key, weight in dense_weights(oracle).items():
        torch.testing.assert_close(dense.get_parameter(key).detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["factors", "core"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_learned_leaves_the_protected_directions_alone_and_the_metric_says_so(form, dtype):
    model = network(dtype)
    before = {key: weight.double().clone() for key, weight in dense_weights(model).items()}
    optimizer = OsftOptimizer(model, torch.optim.AdamW, unfreeze_rank_ratio=RATIO, form=form, lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, 0, dtype)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    assert optimizer.metrics()["osft_leak"] <= limit
    squares = 0.0
    for key in (f"layers.{index}.weight" for index in range(3)):
        u, _, v = torch.linalg.svd(before[key], full_matrices=False)
        moved = model.get_parameter(key).detach().double() - before[key]
        inside = moved - (moved - u[:, :11] @ (u[:, :11].T @ moved)) @ (torch.eye(v.shape[1]) - v[:11].T @ v[:11])
        # The weights themselves are rounded in every step: half a unit in the last place, of numbers below 1.
        rounding = torch.finfo(dtype).eps * STEPS * moved.numel() ** 0.5
        assert inside.norm() <= 2 * limit * moved.norm() + rounding
        squares += float(moved.square().sum())
    whole = sum(float(before[f"layers.{index}.weight"].square().sum()) for index in range(3))
    # The update as a dense difference carries the rounding of the weights, 6e-8 of each.
    assert optimizer.metrics()["osft_drift"] == pytest.approx((squares / whole) ** 0.5, rel=1e-4)


def test_the_metric_sees_a_leak_that_was_put_there():
    model = network()
    optimizer = OsftOptimizer(model, torch.optim.SGD, unfreeze_rank_ratio=RATIO, lr=0.1)
    loss_of(model, 0).backward()
    optimizer.step()
    tall = next(one.trained for one in optimizer.spaces.spaces if not one.trained.split.is_square)
    clean = tall.low().norm()
    tall.split.protected.mul_(0)  # nothing is projected on this side any more
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    tall.split.protected.copy_(torch.linalg.svd(network().layers[1].weight.detach())[0][:, :11])
    leak, size = leak_and_size(tall.split, tall.low())
    assert size.sqrt() > clean * 0.1
    assert leak > 1e-3


def test_bfloat16_weights_are_the_rounding_of_an_exact_run_and_tiny_steps_count():
    low = network(torch.bfloat16)
    full = copy.deepcopy(low).float()
    kind, settings = torch.optim.SGD, {"lr": 1e-4}
    ours = OsftOptimizer(low, kind, unfreeze_rank_ratio=RATIO, others="freeze", **settings)
    exact = OsftOptimizer(full, kind, unfreeze_rank_ratio=RATIO, others="freeze", **settings)
    for number in range(20):
        for model, optimizer in ((low, ours), (full, exact)):
            loss_of(model, number, next(model.parameters()).dtype).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in low.named_parameters():
        if name in ours.spaces.parameters:
            assert torch.equal(parameter.detach(), ours.spaces.exact(name).to(torch.bfloat16))
    moved = torch.cat([(low_part.trained.low()).flatten() for low_part in ours.spaces.spaces])
    wanted = torch.cat([(part.trained.low()).flatten() for part in exact.spaces.spaces])
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.99


def test_micro_steps_add_up_as_one_large_step():
    for dtype, is_layerwise in ((torch.float64, False), (torch.float64, True), (torch.bfloat16, True)):
        one, many = network(dtype), network(dtype)
        both = []
        for model, parts in ((one, 1), (many, 4)):
            optimizer = OsftOptimizer(
                model, torch.optim.SGD, unfreeze_rank_ratio=RATIO, is_layerwise=is_layerwise, lr=0.1
            )
            for number in range(4):
                loss = loss_of(model, number, dtype) / 4
                loss.backward() if parts == 4 else None
            if parts == 1:
                torch.stack([loss_of(model, number, dtype) / 4 for number in range(4)]).sum().backward()
            both.append(optimizer.clip_grad_norm_(float("inf")).item())
        assert both[0] == pytest.approx(both[1], rel=1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("form", ["factors", "core"])
def test_saved_and_loaded_goes_on_bit_for_bit(form):
    def make() -> tuple[Network, OsftOptimizer]:
        model = network(torch.float32)
        return model, OsftOptimizer(model, torch.optim.AdamW, unfreeze_rank_ratio=RATIO, form=form, lr=1e-3)

    def go(model: Network, optimizer: OsftOptimizer, steps: range) -> None:
        for number in steps:
            loss_of(model, number, torch.float32).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    go(model, optimizer, range(3))
    kept = optimizer.tensors()
    go(model, optimizer, range(3, 6))
    other, resumed = make()
    resumed.load(kept)
    assert resumed.metrics()["osft_drift"] > 0
    go(other, resumed, range(3, 6))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


def test_schedulers_of_torch_drive_it():
    model = network()
    optimizer = OsftOptimizer(model, torch.optim.SGD, unfreeze_rank_ratio=RATIO, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.0 if number else 1.0)
    loss_of(model, 0).backward()
    optimizer.step()
    schedule.step()
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize(("ratio", "trains"), [(0.0, False), (1.0, True)])
def test_ratio_0_freezes_the_targets_and_ratio_1_trains_them_in_full(ratio, trains):
    model, plain = network(), network()
    optimizer = OsftOptimizer(model, torch.optim.SGD, unfreeze_rank_ratio=ratio, lr=0.1)
    wanted = torch.optim.SGD(plain.parameters(), lr=0.1)
    for one, by in ((model, optimizer), (plain, wanted)):
        loss_of(one, 0).backward()
        by.step()
    for name, parameter in model.named_parameters():
        is_target = name in {f"layers.{index}.weight" for index in range(3)}
        start = network().get_parameter(name)
        expected = plain.get_parameter(name) if trains or not is_target else start
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_backward_of_a_step_frees_each_dense_gradient_and_changes_nothing(dtype):
    def gradients(*, is_told: bool) -> dict[str, torch.Tensor]:
        model = network(dtype)
        spaces = OsftOptimizer(model, unfreeze_rank_ratio=RATIO, lr=1e-3).spaces
        loss_of(model, 0, dtype).backward()
        if is_told:
            spaces.expect_last_backward()
        loss_of(model, 1, dtype).backward()
        if is_told:
            assert all(parameter.grad is None for parameter in spaces.parameters.values())
        spaces.gather()
        return {name: weight.grad for name, weight in spaces.weights().items()}

    told, untold = gradients(is_told=True), gradients(is_told=False)
    assert len(told) == 9
    assert all(torch.equal(told[name], untold[name]) for name in untold)


def test_products_with_bfloat16_gradients_are_those_of_float32_but_for_rounding():
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradient = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    for form in FORMS.values():
        trained = form(split(weight, 16))
        exact, quick = trained.gradients(gradient.float()), trained.gradients(gradient)
        for name, wanted in trained.project(exact).items():
            found = trained.project(quick, torch.bfloat16)[name]
            assert found.dtype == torch.float32
            # Three roundings to 8 bits of mantissa, each 2^-9 of a number.
            assert (found - wanted).norm() < 3 * 2**-8 * wanted.norm(), name
