"""The chunked head: its loss and gradients against plain autograd."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused.low_rank import LowRank
from training_hub.backends.torch_engine.objectives import head as head_module
from training_hub.backends.torch_engine.objectives.head import Head, _HeadLoss, chunk_rows
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [7, 5], weight [11, 5], bias [11], targets [7], weights [7]."""
    torch.manual_seed(0)
    tensors = [torch.randn(7, 5, dtype=dtype), torch.randn(11, 5, dtype=dtype), torch.randn(11, dtype=dtype)]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors)
    return hidden, weight, bias, torch.randint(0, 11, (7,)), torch.rand(7)


def reference(head: Head, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.multiplier
    logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_are_the_derivatives_of_the_loss(rows: int, cap: float | None, biased: bool) -> None:
    hidden, weight, bias, targets, weights = case()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        criterion = TokenCriterion(PLAIN, targets, weights)
        one = bias if biased else None
        return _HeadLoss.apply(hidden, weight, one, None, None, criterion, 0.7, cap, rows, True)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_an_adapter_on_the_head_has_the_derivatives_of_the_sum(rows, cap, monkeypatch) -> None:
    hidden, weight, bias, targets, weights = case()
    monkeypatch.setattr(head_module, "chunk_rows", lambda vocabulary, device: rows)
    down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (11, 2)))
    head = Head(weight, bias, multiplier=0.7, cap=cap, adapter=LowRank(down, up, 1.5))
    whole = Head(weight + 1.5 * up @ down, bias, multiplier=0.7, cap=cap)
    torch.testing.assert_close(head.logits(hidden), whole.logits(hidden))
    inputs = (hidden, weight, bias, down, up)
    found = torch.autograd.grad(head.loss(hidden, targets, weights), inputs)
    wanted = torch.autograd.grad(reference(whole, hidden, targets, weights), inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_loss_is_that_of_plain_logits(cap: float | None) -> None:
    hidden, weight, bias, targets, weights = case()
    head = Head(weight, bias, multiplier=0.7, cap=cap)
    torch.testing.assert_close(head.loss(hidden, targets, weights), reference(head, hidden, targets, weights))


def test_gradients_follow_a_factor_applied_after_the_loss_even_twice() -> None:
    hidden, weight, bias, targets, weights = case()
    head = Head(weight, bias)
    total = head.loss(hidden, targets, weights) / 8
    total.backward(retain_graph=True)
    once = weight.grad.clone()
    total.backward()
    weight.grad.div_(2)
    torch.testing.assert_close(weight.grad, once)
    wanted = torch.autograd.grad(reference(head, hidden, targets, weights) / 8, weight)[0]
    torch.testing.assert_close(once, wanted)


def test_a_tied_weight_gets_the_gradient_of_both_uses() -> None:
    _, weight, _, targets, weights = case()
    hidden = weight[:7] * 2
    wanted = torch.autograd.grad(reference(Head(weight), weight[:7] * 2, targets, weights), weight)[0]
    found = torch.autograd.grad(Head(weight).loss(hidden, targets, weights), weight)[0]
    torch.testing.assert_close(found, wanted)


def test_a_bfloat16_head_sums_its_gradient_over_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(512, 16).bfloat16()
    weight = (0.1 * torch.randn(64, 16)).bfloat16().requires_grad_()
    targets, weights = torch.randint(0, 64, (512,)), torch.rand(512)
    monkeypatch.setattr(head_module, "chunk_rows", lambda vocabulary, device: 4)
    Head(weight).loss(hidden, targets, weights).backward()
    exact = weight.detach().double().requires_grad_()
    reference(Head(exact), hidden.double(), targets, weights).backward()
    # 128 chunks summed in bfloat16 would be off by about 3 %; once rounded it is 0.4 % at most.
    assert (weight.grad.double() - exact.grad).norm() / exact.grad.norm() < 6e-3


def test_no_gradient_is_formed_where_none_is_wanted() -> None:
    hidden, weight, _, targets, weights = case()
    with torch.no_grad():
        assert Head(weight).loss(hidden, targets, weights).grad_fn is None
    assert Head(weight.detach()).loss(hidden.detach(), targets, weights).grad_fn is None


def test_chunks_hold_about_64_mebibytes_of_logits_on_a_cpu() -> None:
    assert chunk_rows(32_000, "cpu") == 64 * 2**20 // (4 * 32_000)
    assert chunk_rows(10**6, "cpu") == head_module.SMALLEST_CHUNK


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads a process's peak as Linux gives it")
def test_the_peak_with_a_large_vocabulary_does_not_contain_the_logits() -> None:
    script = (
        "import resource, torch; from training_hub.backends.torch_engine.objectives.head import Head;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024;"
        "weight = torch.zeros(131072, 8, dtype=torch.bfloat16, requires_grad=True);"
        "hidden = torch.ones(8192, 8, dtype=torch.bfloat16, requires_grad=True);"
        "run = lambda rows: Head(weight).loss(hidden[:rows], torch.arange(rows), torch.ones(rows)).backward();"
        "run(16); before = peak(); run(8192); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # The logits of 8,192 tokens are 2 GiB in bfloat16 and 4 in float32.
    assert int(done.stdout) < 0.75 * 2**30
