"""Float32 products by oneDNN are torch's to rounding, forward and backward, and are taken where the processor asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.backends.torch_engine.tiny_models import from_config, random_pack, tiny_config
from training_hub.backends.torch_engine.checkpointing import is_kept
from training_hub.backends.torch_engine.fused import onednn, panels
from training_hub.backends.torch_engine.fused.products import add_product_, linear, product
from training_hub.backends.torch_engine.fused.swap import run_on_kernels
from training_hub.backends.torch_engine.objectives.head import Head
from training_hub.backends.torch_engine.tensors import to_device

CLOSE = 2e-6
"""Sums of 512 products in float32, in another order: a few roundings of 6e-8, as a share of the largest number."""

pytestmark = pytest.mark.skipif(onednn.problem() is not None, reason=str(onednn.problem()))


@pytest.fixture(autouse=True)
def slow_for_mkl(monkeypatch):
    """As on a processor on which MKL is slow, whichever this is, and without our own kernel."""
    monkeypatch.setattr(onednn, "is_trusted", lambda: True)
    monkeypatch.setattr(panels, "is_trusted", lambda dtype: False)


def apart(one, other) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("is_biased", [True, False])
def test_outputs_and_gradients_are_those_of_torch_to_rounding(is_biased: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 300, 512), torch.randn(768, 512), torch.randn(768)
    upstream, found = torch.randn(2, 300, 768), []
    assert onednn.pays(x.view(-1, 512), weight.T)
    for multiply in (linear, nn.functional.linear):
        mine = [one.clone().requires_grad_() for one in (x, weight, bias)]
        y = multiply(mine[0], mine[1], mine[2] if is_biased else None)
        assert ("_Linear" in type(y.grad_fn.next_functions[0][0]).__name__) == (multiply is linear)
        y.backward(upstream)
        found.append([y.detach(), *(one.grad for one in mine if one.grad is not None)])
    assert len(found[0]) == len(found[1]) == (4 if is_biased else 3)
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and ours.is_contiguous() and apart(ours, theirs) < CLOSE


def test_what_is_frozen_gets_no_gradient_and_costs_none() -> None:
    x, weight = torch.randn(600, 512, requires_grad=True), nn.Parameter(torch.randn(768, 512), requires_grad=False)
    linear(x, weight).sum().backward()
    assert weight.grad is None and x.grad is not None
    lowest, trained = torch.randn(600, 512), nn.Parameter(torch.randn(768, 512))
    linear(lowest, trained).sum().backward()
    assert lowest.grad is None and trained.grad is not None


def test_two_passes_add_up_and_a_second_run_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(600, 512), torch.randn(768, 512)
    sums = []
    for _ in range(2):
        trained = nn.Parameter(weight.clone())
        for rows in (x, x.flip(0)):
            linear(rows, trained).square().sum().backward()
        sums.append(trained.grad)
    assert torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("is_left_turned", [True, False])
@pytest.mark.parametrize("is_right_turned", [True, False])
def test_matrices_may_lie_in_any_way(is_left_turned: bool, is_right_turned: bool) -> None:
    left, right = torch.randn(500, 700), torch.randn(700, 300)
    left = left.T.contiguous().T if is_left_turned else left
    right = right.T.contiguous().T if is_right_turned else right
    total = torch.randn(500, 300)
    wanted = left.double() @ right.double()
    assert onednn.pays(left, right)
    assert apart(product(left, right), wanted) < CLOSE
    before = total.clone()
    add_product_(total, left, right)
    assert apart(total, before.double() + wanted) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_left_to_torch(dtype: torch.dtype) -> None:
    left, right = torch.randn(600, 512).to(dtype), torch.randn(512, 768).to(dtype)
    assert not onednn.pays(left, right)
    assert torch.equal(onednn.multiply(left, right), left @ right)


def test_a_head_takes_its_products_there_and_finds_the_same_loss_and_gradients(monkeypatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(700, 128), torch.randn(2048, 128) / 16, torch.randint(0, 2048, (700,))
    found = []
    for is_trusted in (True, False):
        monkeypatch.setattr(onednn, "is_trusted", lambda answer=is_trusted: answer)
        mine, table = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
        loss = Head(table).loss(mine, targets, torch.ones(700))
        loss.backward()
        found.append((loss.detach(), mine.grad, table.grad))
    assert all(apart(ours, theirs) < 1e-5 for ours, theirs in zip(*found, strict=True))


def test_a_model_learns_the_same_and_remembers_products_where_it_forgets_the_rest() -> None:
    config = tiny_config("llama", hidden_size=256, intermediate_size=768, initializer_range=0.05)
    one = to_device(random_pack((150, 90, 160)), "cpu")
    assert onednn.pays(torch.zeros(400, 256), torch.zeros(256, 768))
    found = []
    for is_ours in (True, False):
        model = from_config(config)
        if is_ours:
            assert run_on_kernels(model) is None
        model(input_ids=one.ids, position_ids=one.positions, use_cache=False).logits.square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    # Two layers of norms and attention on top of products: 1e-4, as in every comparison of models in float32.
    assert all(apart(found[0][name], gradient) < 1e-4 for name, gradient in found[1].items())
    assert is_kept(torch.ops.mkldnn._linear_pointwise.default)


def test_without_the_operation_torch_multiplies_and_that_is_said(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(onednn, "_operation", lambda: None)
    monkeypatch.setattr(onednn, "is_slow_for_mkl", lambda: True)
    onednn.problem.cache_clear()
    onednn.is_trusted.cache_clear()
    try:
        assert not onednn.is_trusted()
        assert "through MKL, which is slow on this processor: torch" in str(onednn.note())
        left, right = torch.randn(600, 512), torch.randn(512, 768)
        assert torch.equal(onednn.multiply(left, right), left @ right)
    finally:
        onednn.problem.cache_clear()
        onednn.is_trusted.cache_clear()
