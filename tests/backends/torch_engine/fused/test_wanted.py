"""A backward pass for activations multiplies for these alone, and one for weights for those: two halves of the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode

from training_hub.backends.torch_engine.fused import eight_bit, one_input
from training_hub.backends.torch_engine.fused.low_rank import project, run_adapters_fused
from training_hub.backends.torch_engine.fused.products import _Linear
from training_hub.backends.torch_engine.layouts.abilities import can_split_backward

pytestmark = pytest.mark.skipif(not can_split_backward(), reason="this torch makes gradients of weights wrongly")
T, K, N = 24, 16, 12


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({name: nn.Linear(K, N) for name in ("q", "v")})
    model.requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    run_adapters_fused(model)
    return model


def one(layers: nn.Module, x: Tensor) -> Tensor:
    return _Linear.apply(x, layers["q"].weight, layers["q"].bias)


def several(layers: nn.Module, x: Tensor) -> Tensor:
    return torch.cat(one_input.project(x, [layers["q"], layers["v"]]), -1)


def with_adapters(layers: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([*project(x, [layers["q"], layers["v"]])], -1)


def rounded(layers: nn.Module, x: Tensor) -> Tensor:
    return eight_bit.linear(x, layers["q"].weight, layers["q"].bias)


def plain() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(K, N) for name in ("q", "v")})


# An adapter's gradient by x A^T is needed for both: two products of T x N x r are made twice.
CASES: dict[str, tuple[Any, Any, int]] = {
    "one": (plain, one, 0),
    "several of one input": (plain, several, 0),
    "adapters": (adapted, with_adapters, 2 * 2 * T * N * 2),
    "rounded": (plain, rounded, 0),
}


def split_and_whole(layers: nn.Module, run: Any) -> tuple[list[int], list[list[Tensor]]]:
    """Operations of products in the pass for activations, in that for weights and in one for both; and the gradients of
    the two, and of the one."""
    trained = [weight for weight in layers.parameters() if weight.requires_grad]
    given = torch.randn(T, K, generator=torch.Generator().manual_seed(0))

    def forward() -> tuple[Tensor, Tensor]:
        for weight in trained:
            weight.grad = None
        x = given.clone().requires_grad_()
        return x, 1.0 * run(layers, 1.0 * x)  # a stage begins and ends with others' operations

    counted = []
    x, y = forward()
    with FlopCounterMode(display=False) as counter:
        _, groups = stage_backward_input([y], [torch.ones_like(y)], [x], iter(trained))
    counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        stage_backward_weight(iter(trained), groups)
    counted.append(counter.get_total_flops())
    apart = [x.grad, *(weight.grad for weight in trained)]
    x, y = forward()
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    counted.append(counter.get_total_flops())
    return counted, [apart, [x.grad, *(weight.grad for weight in trained)]]


@pytest.mark.parametrize("case", CASES)
def test_each_pass_multiplies_for_its_own_gradients_alone(case: str) -> None:
    make, run, twice = CASES[case]
    (of_x, of_weights, of_both), (apart, together) = split_and_whole(make(), run)
    assert 0 < of_x < of_both and 0 < of_weights < of_both
    assert of_x + of_weights == of_both + twice
    torch.testing.assert_close(apart, together, rtol=0, atol=0)
