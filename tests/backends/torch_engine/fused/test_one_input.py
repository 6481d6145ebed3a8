"""Layers that read one x find together what each finds alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.fused import one_input
from training_hub.backends.torch_engine.fused.one_input import is_plain, pays, project
from training_hub.backends.torch_engine.fused.products import hold_gradient
from training_hub.backends.torch_engine.fused.swap import multiply_in_eight_bits, swap
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.tensors import to_device

WIDTHS = (6, 4, 4)


def layers_of(dtype: torch.dtype, *, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(5, width, bias=bias, dtype=dtype) for width in WIDTHS]


def learned(outputs: tuple[Tensor, ...] | list[Tensor], x: Tensor, layers: list[nn.Linear]) -> dict[str, Tensor]:
    """By name, what backward makes of outputs that count differently."""
    sum((number + 1) * one.square().sum() for number, one in enumerate(outputs)).backward()  # type: ignore[union-attr]
    found = {f"{n}.{name}": p.grad for n, layer in enumerate(layers) for name, p in layer.named_parameters()}
    return {"x": x.grad, **found}  # type: ignore[dict-item]


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_each_alone(bias: bool) -> None:
    together, alone = layers_of(torch.float64, bias=bias), layers_of(torch.float64, bias=bias)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    outputs, wanted = project(x, together), [layer(other) for layer in alone]
    for one, right in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(one, right)
    found, right_gradients = learned(outputs, x, together), learned(wanted, other, alone)
    assert found.keys() == right_gradients.keys() and len(found) == 1 + 3 * (1 + bias)
    for name, gradient in right_gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_gradients_of_held_weights_go_into_their_sums() -> None:
    layers = layers_of(torch.bfloat16)
    exact = [copy.deepcopy(layer).double() for layer in layers]
    holders = [torch.zeros(len(layer.weight), 5) for layer in layers]
    for layer, holder in zip(layers, holders, strict=True):
        hold_gradient(layer.weight, holder)
    for _ in range(2):
        x = torch.randn(9, 5).bfloat16().requires_grad_()
        learned(project(x, layers), x, layers)
        x_64 = x.detach().double().requires_grad_()
        learned([layer(x_64) for layer in exact], x_64, exact)
        # 8 bits of mantissa: outputs are rounded to them, and so is each of the three sums.
        assert float((x.grad.double() - x_64.grad).norm() / x_64.grad.norm()) < 2e-2  # type: ignore[union-attr]
    for layer, holder, right in zip(layers, holders, exact, strict=True):
        assert layer.weight.grad is None and holder.grad is not None and right.weight.grad is not None
        assert float((holder.grad.double() - right.weight.grad).norm() / right.weight.grad.norm()) < 1e-2


def test_what_is_frozen_or_not_used_gets_no_gradient() -> None:
    layers = layers_of(torch.float64, bias=True)
    layers[0].requires_grad_(False)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    first, second, _ = project(x, layers)
    (first.sum() + second.sum()).backward()
    assert layers[0].weight.grad is None and layers[0].bias.grad is None
    assert layers[1].weight.grad is not None and layers[1].bias.grad is not None
    assert layers[2].weight.grad is None and layers[2].bias.grad is None
    torch.testing.assert_close(x.grad, (layers[0].weight.sum(0) + layers[1].weight.sum(0)).expand(3, 5).detach())


def test_a_model_learns_the_same_where_its_layers_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    found, together = [], []
    for are_together in (False, True):
        model = tiny_model("qwen2")  # whose projections have biases
        model.set_attn_implementation(DOCUMENTS)
        swap(model)
        if are_together:  # as on a GPU
            monkeypatch.setattr(one_input, "pays", lambda x, layers: bool(together.append(len(layers))) or True)
        CrossEntropy()(model, to_device(random_pack(), "cpu")).total.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert together == [3, 2] * 2
    for name, gradient in found[0].items():  # float32, the same sums in the same order but for that of the products
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_cpu_takes_layers_one_by_one() -> None:
    layers = layers_of(torch.float32)
    assert all(map(is_plain, layers)) and not pays(torch.randn(3, 5, requires_grad=True), layers)


def test_layers_that_do_more_than_multiply_are_not_plain() -> None:
    hooked, patched, other = layers_of(torch.float32)
    hooked.register_forward_pre_hook(lambda module, given: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    parametrize.register_parametrization(other, "weight", nn.Identity())
    swapped, rounded = tiny_model("llama"), tiny_model("llama")
    swap(swapped)
    assert multiply_in_eight_bits(rounded)
    layers = [model.get_submodule("model.layers.0.mlp.gate_proj") for model in (swapped, rounded)]
    assert [is_plain(one) for one in (hooked, patched, other, *layers)] == [False, False, False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_plain_layers_together() -> None:
    layers = [layer.cuda() for layer in layers_of(torch.bfloat16)]
    x = torch.randn(3, 5, device="cuda").bfloat16().requires_grad_()
    assert pays(x, layers) and not pays(x, layers[:1]) and not pays(x.detach(), layers)
    layers[1].register_forward_hook(lambda module, given, made: made)
    assert not pays(x, layers)
