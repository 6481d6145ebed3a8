"""What the section `loss` makes of a token: against float64 autograd, in torch and in C, packed and alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.backends.torch_engine.tiny_models import documents_of, random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.fused import functions
from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.objectives.head import _HeadLoss
from training_hub.backends.torch_engine.objectives.noise import Noisy
from training_hub.backends.torch_engine.objectives.token_loss import TokenCriterion, TokenLoss
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.types import Pack

LOSSES = {
    "smoothing": TokenLoss(smoothing=0.1),
    "z": TokenLoss(z=0.3),
    "dft": TokenLoss(dft=True),
    "all": TokenLoss(smoothing=0.2, z=0.05, dft=True),
}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def formula(logits: Tensor, targets: Tensor, loss: TokenLoss, share: Tensor | float = 1.0) -> Tensor:
    """The equation of TokenLoss, written with probabilities, for a given `share`."""
    probabilities = torch.softmax(logits, -1)
    chosen = torch.log(probabilities[torch.arange(len(targets)), targets])
    mixed = (1 - loss.smoothing) * -chosen - loss.smoothing * torch.log(probabilities).mean(-1)
    return share * mixed + loss.z * torch.log(torch.exp(logits).sum(-1)) ** 2


@EACH
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_formed_in_forward_are_the_derivatives(loss: TokenLoss, cap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (11, 5), (11,)))
    inputs = [one.requires_grad_() for one in (hidden, weight, bias)]
    targets, weights = torch.randint(0, 11, (7,)), torch.rand(7, dtype=torch.float64)

    def through_head(*given: Tensor) -> Tensor:
        return _HeadLoss.apply(*given, None, None, TokenCriterion(loss, targets, weights), 0.7, cap, 3, True)[0]

    def through_autograd(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = 0.7 * (hidden @ weight.T + bias)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        share = torch.softmax(logits, -1)[torch.arange(7), targets].detach() if loss.dft else 1.0
        return (formula(logits, targets, loss, share) * weights).sum()

    torch.testing.assert_close(through_head(*inputs), through_autograd(*inputs))
    found, wanted = (torch.autograd.grad(form(*inputs), inputs) for form in (through_head, through_autograd))
    torch.testing.assert_close(found, wanted)
    if not loss.dft:  # whose gradient is not that of its value: its share is a constant
        assert torch.autograd.gradcheck(through_head, inputs)


@EACH
def test_whole_logits_give_the_losses_of_the_equation(loss: TokenLoss) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 13, dtype=torch.float64), torch.randint(0, 13, (9,))
    share = torch.softmax(logits, -1)[torch.arange(9), targets] if loss.dft else 1.0
    torch.testing.assert_close(loss.losses(logits, targets), formula(logits, targets, loss, share))


def test_smoothing_is_that_of_torch() -> None:
    logits, targets = torch.randn(9, 13), torch.randint(0, 13, (9,))
    wanted = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(TokenLoss(smoothing=0.1).losses(logits, targets), wanted)


@EACH
# A rounding of the result to bfloat16 is 2^-9 = 0.002 of each number; float32 sums of a thousand terms lie at 1e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.skipif(kernels() is None, reason="there is no C compiler here")
def test_the_kernel_agrees_with_float64(loss: TokenLoss, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    logits, targets, weights = (3 * torch.randn(20, 1000)).to(dtype), torch.randint(0, 1000, (20,)), torch.rand(20)
    exact = logits.double().requires_grad_()
    wanted = TokenLoss.losses(loss, 0.7 * exact, targets) * weights
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    losses = functions.cross_entropy_(logits, targets, weights, 0.7, loss.smoothing, loss.z, loss.dft)
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-5, atol=1e-6)
    assert float((logits.double() - gradient).norm() / gradient.norm()) < tolerance


def run(model: torch.nn.Module, packs: list[Pack], objective: object) -> tuple[float, Tensor]:
    """Sum of the losses of `packs`, and its gradient by the embeddings."""
    model.zero_grad()
    torch.manual_seed(5)
    total = sum(objective(model, to_device(one, "cpu")).total for one in packs)  # type: ignore[operator]
    total.backward()
    return float(total.detach()), model.get_input_embeddings().weight.grad.clone()


@EACH
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_pack_gives_what_its_documents_give_alone(loss: TokenLoss, family: str) -> None:
    register_attention()
    model, pack = tiny_model(family, torch.float64), random_pack()
    model.set_attn_implementation(DOCUMENTS)
    objective = Noisy(CrossEntropy(loss=loss), alpha=2.0)
    packed, gradient = run(model, [pack], objective)
    alone, wanted = run(model, documents_of(pack), objective)
    assert packed == pytest.approx(alone, rel=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)
    whole, _ = run(model, [pack], replace(objective, objective=CrossEntropy(through_head=False, loss=loss)))
    assert packed == pytest.approx(whole, rel=1e-6)  # whole logits are computed in float32


def test_noise_is_bounded_drawn_anew_each_step_and_absent_in_evaluation() -> None:
    model, pack = tiny_model("llama"), random_pack()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda layer, given, made: seen.append(made.detach()))
    noisy, tensors = Noisy(CrossEntropy(), alpha=5.0), to_device(pack, "cpu")
    noises = []
    for step in (1, 1, 2):
        torch.manual_seed(step)
        noises.append(noisy._noise(tensors, torch.zeros(1, len(pack), 32))[0])
        assert float(noisy(model, tensors).total.detach()) != float(CrossEntropy()(model, tensors).total.detach())
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])
    for start, length in zip(pack.boundaries, tensors.lengths, strict=False):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.9 * bound < float(noises[0][start : start + length].abs().max()) <= bound
    model.eval()
    assert float(noisy(model, tensors).total.detach()) == float(CrossEntropy()(model, tensors).total.detach())
