"""Products that add the gradient of their weight to a sum by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training_hub.backends.torch_engine.fused.products import add_product_, hold_gradient, linear, product


@pytest.mark.parametrize("is_biased", [True, False])
def test_two_passes_add_up_in_the_holder_and_autograd_gets_the_rest(is_biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(5, 3).bfloat16()), nn.Parameter(torch.randn(5).bfloat16())
    exact = weight.detach().double().requires_grad_()
    exact_bias = bias.detach().double().requires_grad_()
    holder = torch.zeros(5, 3)
    hold_gradient(weight, holder)
    for _ in range(2):
        x, upstream = torch.randn(2, 4, 3).bfloat16().requires_grad_(), torch.randn(2, 4, 5).bfloat16()
        linear(x, weight, bias if is_biased else None).backward(upstream)
        x_64 = x.detach().double().requires_grad_()
        nn.functional.linear(x_64, exact, exact_bias if is_biased else None).backward(upstream.double())
        # 8 bits of mantissa, and on a CPU each product is rounded to them once.
        assert float((x.grad.double() - x_64.grad).norm() / x_64.grad.norm()) < 1e-2
    assert weight.grad is None and holder.grad is not None and holder.grad.dtype == torch.float32
    assert float((holder.grad.double() - exact.grad).norm() / exact.grad.norm()) < 1e-2
    assert (bias.grad is not None) == is_biased


def test_without_a_holder_autograd_has_the_gradient() -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    linear(torch.randn(4, 3), weight).sum().backward()
    assert weight.grad is not None


def test_a_frozen_weight_gets_no_gradient_though_it_has_a_holder() -> None:
    weight, holder = nn.Parameter(torch.randn(5, 3), requires_grad=False), torch.zeros(5, 3)
    hold_gradient(weight, holder)
    linear(torch.randn(4, 3, requires_grad=True), weight).sum().backward()
    assert weight.grad is None and holder.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_adds_products_of_bfloat16_to_a_float32_sum_in_place() -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(300, 256, device="cuda").bfloat16() for _ in range(2))
    total = torch.randn(256, 256, device="cuda")
    before, place = total.double(), total.data_ptr()
    add_product_(total, left.T, right)
    wanted = before + left.double().T @ right.double()
    assert total.data_ptr() == place
    # Products of bfloat16 are exact in float32, so only the order of sums differs.
    assert float((total.double() - wanted).norm() / wanted.norm()) < 1e-5
    wanted = left.double().T @ right.double()
    assert float((product(left.T, right).double() - wanted).norm() / wanted.norm()) < 1e-5


def test_of_no_rows_there_is_a_product_too() -> None:
    """As of a pack in which nothing is trained: the last layer goes on with no token of it."""
    weight, holder = nn.Parameter(torch.randn(64, 32).bfloat16()), torch.zeros(64, 32)
    hold_gradient(weight, holder)
    x = torch.randn(1, 0, 32).bfloat16().requires_grad_()
    made = linear(x, weight)
    made.sum().backward()
    assert made.shape == (1, 0, 64) and x.grad is not None and x.grad.shape == x.shape
    assert holder.grad is not None and not holder.grad.any()
