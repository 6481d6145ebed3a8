"""Distillation's loss and gradient: against naive float64, finite differences, in torch and in C."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.objectives import head as head_module
from training_hub.backends.torch_engine.objectives.distillation import DistillationCriterion
from training_hub.backends.torch_engine.objectives.divergence import KINDS, Divergence
from training_hub.backends.torch_engine.objectives.head import Head
from training_hub.backends.torch_engine.objectives.targets import DrawnTargets, Targets, TopTargets, WholeTargets
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion, TokenLoss

KIND = pytest.mark.parametrize("kind", KINDS)
NEEDS_KERNELS = pytest.mark.skipif(kernels() is None, reason="there is no C compiler here")


def naive(logits: Tensor, teacher: Tensor, targets: Tensor, divergence: Divergence) -> Tensor:
    """The loss of the guide, with probabilities and torch's own kl_div, from whole logits."""
    p, q = (torch.softmax(one / divergence.temperature, -1) for one in (teacher, logits))

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(other.log(), one, reduction="none").sum(-1)

    middle = divergence.beta * p + (1 - divergence.beta) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: divergence.beta * kl(p, middle) + (1 - divergence.beta) * kl(q, middle),
    }[divergence.kind]()
    tokens = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return divergence.alpha * divergence.temperature**2 * value + (1 - divergence.alpha) * tokens


class Case:
    """Nine trained positions: a student of width 5 with 11 tokens, a teacher of width 8 with 13, 10 in common."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, common: int = 10, scale: float = 1.0):
        torch.manual_seed(0)
        self.hidden = (scale * torch.randn(9, 5)).to(dtype).requires_grad_()
        self.weight = torch.randn(11, 5).to(dtype).requires_grad_()
        self.states, self.teacher_weight = (scale * torch.randn(9, 8)).to(dtype), torch.randn(13, 8).to(dtype)
        self.targets, self.weights = torch.randint(0, 10, (9,)), torch.rand(9)
        self.common = common
        # Students of other tests than those of kernels have a cap, and teachers a bias, as some families do.
        self.plain_teacher = Head(self.teacher_weight, multiplier=0.5)

    def whole(self, head: Head | None = None) -> WholeTargets:
        return WholeTargets(self.common, self.states, head or self.plain_teacher)

    def teacher_logits(self, head: Head | None = None) -> Tensor:
        return (head or self.plain_teacher).logits(self.states)[:, : self.common]

    def criterion(self, divergence: Divergence, targets: Targets, loss: TokenLoss = PLAIN) -> DistillationCriterion:
        return DistillationCriterion(divergence, TokenCriterion(loss, self.targets, self.weights), targets, self.common)

    def loss(self, head: Head, divergence: Divergence, targets: Targets, loss: TokenLoss = PLAIN) -> Tensor:
        return head.weigh(self.hidden, self.criterion(divergence, targets, loss))[0]

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, (self.hidden, self.weight))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "chunk_rows", lambda vocabulary, device: 4)


@KIND
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_are_those_of_the_naive_form(kind: str, alpha: float, temperature: float) -> None:
    case, divergence = Case(common=11), Divergence(kind, 0.3, temperature, alpha)
    bias = torch.randn(13, dtype=torch.float64)
    teacher = Head(case.teacher_weight, bias, multiplier=0.5, cap=3.0)
    student = Head(case.weight, multiplier=0.7, cap=2.0)
    found = case.loss(student, divergence, case.whole(teacher))
    logits = 2.0 * torch.tanh(0.7 * case.hidden @ case.weight.T / 2.0)
    wanted = (naive(logits, case.teacher_logits(teacher), case.targets, divergence) * case.weights).sum()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(case.gradients(found), case.gradients(wanted))


@KIND
def test_finite_differences_agree(kind: str) -> None:
    case, divergence = Case(), Divergence(kind, 0.3, 1.7, 0.6)
    targets, loss = case.whole(), TokenLoss(smoothing=0.1, z=0.01)

    def through_head(hidden: Tensor, weight: Tensor) -> Tensor:
        return Head(weight, multiplier=0.7, cap=2.0).weigh(hidden, case.criterion(divergence, targets, loss))[0]

    assert torch.autograd.gradcheck(through_head, (case.hidden, case.weight))


@KIND
def test_tokens_that_only_one_of_them_has_are_left_to_cross_entropy(kind: str) -> None:
    case = Case(common=10)
    alone = case.loss(Head(case.weight), Divergence(kind), case.whole())
    assert not case.gradients(alone)[1][10].any()  # the student's own eleventh
    both = case.loss(Head(case.weight), Divergence(kind, alpha=0.5), case.whole())
    assert case.gradients(both)[1][10].any()


@KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_is_no_distance_from_itself(kind: str, dtype: torch.dtype) -> None:
    case = Case(dtype, common=11, scale=3.0)
    student = Head(case.weight, multiplier=0.7)
    same = WholeTargets(11, case.hidden.detach(), Head(case.weight.detach(), multiplier=0.7))
    total = case.loss(student, Divergence(kind), same)
    hidden, weight = case.gradients(total)
    # Sums of eleven terms near 1 in their last place: 2e-16 and 6e-8 each.
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    assert abs(float(total.detach())) < tolerance
    assert float(hidden.abs().max()) < 10 * tolerance and float(weight.abs().max()) < 10 * tolerance


def top(case: Case, kept: int, temperature: float) -> TopTargets:
    logs = torch.log_softmax(case.teacher_logits() / temperature, -1)
    chosen = logs.topk(kept)
    tails = 1 - chosen.values.exp().sum(-1) if kept < case.common else None
    return TopTargets(chosen.indices, chosen.values, tails, case.common)


@KIND
def test_all_tokens_kept_are_the_teacher_itself(kind: str) -> None:
    case, divergence = Case(), Divergence(kind, 0.3, 1.7, 0.6)
    found = case.loss(Head(case.weight), divergence, top(case, case.common, 1.7))
    wanted = case.loss(Head(case.weight), divergence, case.whole())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(case.gradients(found), case.gradients(wanted))


@pytest.mark.parametrize(("form", "kind"), [*(("top", kind) for kind in KINDS), ("drawn", "forward_kl")])
def test_gradients_against_kept_tokens_are_the_derivatives(kind: str, form: str) -> None:
    case, divergence = Case(), Divergence(kind, 0.3, 1.7, 0.6)
    # Drawn tokens say what their mean is, and of the three only KL(p, q) is linear in p.
    targets: Targets = top(case, 3, 1.7) if form == "top" else drawn(case, 6, 1.7)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: Head(weight).weigh(hidden, case.criterion(divergence, targets))[0],
        (case.hidden, case.weight),
    )
    total = case.loss(Head(case.weight), divergence, targets)
    logits = case.hidden @ case.weight.T
    plain = divergence.scale * targets.plain_losses(logits[:, : case.common], divergence)
    plain = plain + 0.4 * torch.nn.functional.cross_entropy(logits, case.targets, reduction="none")
    torch.testing.assert_close(total, (plain * case.weights).sum())


@KIND
def test_others_as_one_token_bring_the_distributions_no_further_apart(kind: str) -> None:
    """What is told less of cannot be told apart better; with more tokens kept the distance grows to the whole."""
    case, divergence = Case(), Divergence(kind, 0.3)
    totals = [float(case.loss(Head(case.weight), divergence, top(case, kept, 1.0)).detach()) for kept in (1, 3, 6, 10)]
    assert totals == sorted(totals) and totals[0] > 0
    assert totals[-1] == pytest.approx(float(case.loss(Head(case.weight), divergence, case.whole()).detach()))


def drawn(case: Case, count: int, temperature: float) -> DrawnTargets:
    p = torch.softmax(case.teacher_logits() / temperature, -1)
    ids = torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(0))
    return DrawnTargets(ids, -(p * p.log()).sum(-1), case.common)


def test_drawn_tokens_are_the_teacher_on_average() -> None:
    case, divergence = Case(), Divergence()
    many = case.loss(Head(case.weight), divergence, drawn(case, 200_000, 1.0))
    whole = case.loss(Head(case.weight), divergence, case.whole())
    # A mean of 200,000 draws lies within about 1/450 of a standard deviation, and logits spread by about 2.
    assert float(many.detach()) == pytest.approx(float(whole.detach()), rel=0.01)
    for one, other in zip(case.gradients(many), case.gradients(whole), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


@NEEDS_KERNELS
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize(
    ("form", "kind"),
    [*((form, kind) for form in ("whole", "top", "all") for kind in KINDS), ("drawn", "forward_kl")],
)
# One rounding of logits and gradient to bfloat16 is 2^-9 = 0.002 each, of sums of some ten terms.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_kernel_agrees_with_torch(
    kind: str, alpha: float, form: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, divergence = Case(dtype), Divergence(kind, 0.3, 1.7, alpha)
    made: dict[str, Any] = {
        "whole": case.whole, "top": lambda: top(case, 3, 1.7), "all": lambda: top(case, 10, 1.7),
        "drawn": lambda: drawn(case, 6, 1.7),
    }  # fmt: skip
    targets, student = made[form](), Head(case.weight, multiplier=0.7)
    assert case.criterion(divergence, targets).has_kernel
    fast = case.loss(student, divergence, targets)
    gradients = case.gradients(fast)
    monkeypatch.setattr(DistillationCriterion, "has_kernel", False)
    plain = case.loss(student, divergence, targets)
    assert float(fast.detach()) == pytest.approx(float(plain.detach()), rel=tolerance, abs=tolerance)
    for one, other in zip(gradients, case.gradients(plain), strict=True):
        assert float((one - other).float().norm() / other.float().norm()) < tolerance


@NEEDS_KERNELS
def test_the_kernels_see_what_is_not_a_number() -> None:
    case = Case(torch.float32)
    with torch.no_grad():
        case.hidden[4] = float("nan")
    for targets in (case.whole(), top(case, 3, 1.0), drawn(case, 6, 1.0)):
        assert case.loss(Head(case.weight), Divergence(), targets).isnan()
