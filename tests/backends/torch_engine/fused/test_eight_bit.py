"""Products in 8-bit floating point: what they lose, and that packing does not change it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.engine import TorchEngine
from training_hub.backends.torch_engine.fused.eight_bit import FORMAT, LARGEST, linear, problem_on, quantize_rows
from training_hub.backends.torch_engine.fused.products import hold_gradient
from training_hub.backends.torch_engine.fused.swap import multiply_in_eight_bits
from training_hub.recipe.load import build

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
LOST = 0.06
"""Two roundings to 3 bits of mantissa lose 2.6 % of each factor on average, 3.7 % of a sum of products of both."""


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_held", [True, False])
def test_result_and_gradients_are_those_of_the_plain_product_to_3_bits(device: str, is_held: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, device=device).bfloat16() for s in ((96, 256), (128, 256), (128,)))
    weight *= torch.linspace(0.001, 10, 128, device=device)[:, None]  # each row has a scale of its own
    upstream = torch.randn(96, 128, device=device).bfloat16()
    x, weight, bias = (one.requires_grad_() for one in (x, weight, bias))
    holder = torch.zeros(128, 256, device=device)
    if is_held:
        hold_gradient(weight, holder)
    exact = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    found, wanted = linear(x, weight, bias), torch.nn.functional.linear(*exact)
    found.backward(upstream)
    wanted.backward(upstream.double())
    assert off(found, wanted) < LOST and off(x.grad, exact[0].grad) < LOST
    # The gradient of the weight is a product of 16-bit numbers.
    assert off(holder.grad if is_held else weight.grad, exact[1].grad) < 5e-3
    assert off(bias.grad, exact[2].grad) < 1e-2
    assert (weight.grad is None) == is_held


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_says_the_same_whatever_it_is_multiplied_with(device: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 64, device=device).bfloat16(), torch.randn(32, 64, device=device).bfloat16()
    x[1:] *= 100
    alone = linear(x[:16], weight)
    # The products themselves may add up in another order for another number of rows.
    assert off(linear(x, weight)[:16], alone.double()) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_fills_the_range_of_the_format_and_zeros_stay(device: str) -> None:
    numbers = torch.tensor([[1e-9, -2e-9, 0.0], [3e6, 1.0, 0.0], [0.0, 0.0, 0.0]], device=device)
    low, scales = quantize_rows(numbers.bfloat16())
    assert low.dtype == FORMAT
    assert low.float().abs().amax(1).tolist() == [LARGEST, LARGEST, 0.0]
    assert torch.allclose(
        (low.float() * scales[:, None])[:2].abs().amax(1), torch.tensor([2e-9, 3e6], device=device), rtol=1e-2
    )


def test_linear_layers_but_the_head_multiply_in_8_bits_and_the_model_says_about_the_same() -> None:
    model = tiny_model("llama").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert multiply_in_eight_bits(model) == 2 * 7
        after = model(ids).logits
    assert type(model.lm_head) is torch.nn.Linear
    assert 0 < off(after, before.double()) < 0.2


def test_a_cpu_is_refused_in_words() -> None:
    assert problem_on(torch.device("cpu")) == (
        "training.fp8: 8-bit products need a CUDA device, this run is on cpu. Set training.fp8 to false."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine multiplies 8-bit numbers, or says why not")
def test_a_recipe_that_asks_for_it_here_is_refused_before_anything_is_loaded() -> None:
    recipe = build({"model.path": "(given)", "output": "out", "data.path": "rows.jsonl", "training.fp8": True})
    assert TorchEngine().objections(recipe) == [problem_on(torch.device("cpu"))]
