"""Each kernel against the same formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused import functions
from training_hub.backends.torch_engine.fused.build import kernels, kernels_problem

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {kernels_problem()}")

# Largest share of a result's norm that rounding takes: float32 keeps 24 bits, bfloat16 8, rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def assert_same(
    fused: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Result and gradients of `fused` are those of `formula` in float64."""
    exact = [one.detach().double().requires_grad_() for one in inputs]
    found, wanted = fused(*inputs), formula(*exact)
    upstream = torch.randn_like(wanted).to(dtype)
    found_gradients = torch.autograd.grad(found, inputs, upstream)
    wanted_gradients = torch.autograd.grad(wanted, exact, upstream.double())
    for ours, right in zip((found, *found_gradients), (wanted, *wanted_gradients), strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        assert float((ours.detach().double() - right.detach()).norm() / right.detach().norm()) < TOLERANCE[dtype]


def plain_attention(lengths: tuple[int, ...], window: int | None) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * 0.3
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        back = torch.arange(len(document))[:, None] - torch.arange(len(document))[None, :]
        sees = (document[:, None] == document) & (back >= 0) & (back < (window or 10**6))
        shares = torch.softmax(scores.masked_fill(~sees, float("-inf")), -1)
        return (shares @ value.repeat_interleave(repeats, 1)).transpose(1, 2)

    return attend


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 7, 50], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width", "value_width"),
    [
        ((1, 3), 1, 1, 1, 1),
        ((5, 9, 5, 1), 4, 2, 8, 8),
        ((48, 49, 47, 97), 2, 2, 16, 16),  # about the border of a block of queries
        ((130, 17), 6, 2, 20, 12),  # widths that fill no vector
        ((200,), 3, 1, 64, 80),
    ],
)
def test_attention_is_that_of_each_document_alone(
    dtype: torch.dtype, window: int | None, lengths: tuple[int, ...], heads: int, kv_heads: int, width: int,
    value_width: int,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    inputs = [
        random(1, sum(lengths), *shape, dtype=dtype).transpose(1, 2).detach().requires_grad_() for shape in shapes
    ]
    if window == 1:  # then nothing depends on queries and keys, whose gradients are rounding alone
        query, key = (one.detach() for one in inputs[:2])
        assert_same(
            lambda value: functions.attention(query, key, value, lengths, 0.3, window),
            lambda value: plain_attention(lengths, window)(query.double(), key.double(), value),
            inputs[2:],
            dtype,
        )
        return
    assert_same(
        lambda *parts: functions.attention(*parts, lengths, 0.3, window),
        plain_attention(lengths, window),
        inputs,
        dtype,
    )


def test_a_document_attends_the_same_bits_alone_and_in_any_pack_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    lengths = (33, 120, 61)
    query, key, value = (random(1, heads, 214, 16, dtype=torch.float32) for heads in (4, 2, 2))
    upstream = torch.randn(1, 214, 4, 16)

    def run(part: slice, of: tuple[int, ...], threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        inputs = [one[:, :, part].detach().requires_grad_() for one in (query, key, value)]
        output = functions.attention(*inputs, of, 0.25, None)
        gradients = torch.autograd.grad(output, inputs, upstream[:, part])
        torch.set_num_threads(before)
        return [output, *(one.transpose(1, 2) for one in gradients)]

    packed = run(slice(None), lengths, 3)
    alone = run(slice(33, 153), (120,), 1)
    for whole, one in zip(packed, alone, strict=True):
        assert torch.equal(whole[:, 33:153], one)


def test_attention_takes_scores_of_any_size_and_shows_what_is_not_a_number() -> None:
    query, key, value = (random(1, 2, 40, 16, dtype=torch.float32, scale=100.0) for _ in range(3))
    assert functions.attention(query, key, value, (40,), 1.0, None).isfinite().all()
    with torch.no_grad():
        query[0, 1, 7, 3] = float("nan")
    assert functions.attention(query, key, value, (40,), 1.0, None)[0, 7, 1].isnan().all()


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3, 5), (130, 48), (2, 65, 3, 16)], ids=str)
def test_rms_norm_is_its_formula(dtype: torch.dtype, offset: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (weight + offset)

    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)]
    assert_same(lambda *parts: functions.rms_norm(*parts, 1e-3, offset), formula, inputs, dtype)


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3, 5), (130, 48)], ids=str)
def test_a_norm_adds_the_gradient_that_went_around_it(
    dtype: torch.dtype, offset: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (weight + offset)

    x, delta, weight = (random(*sizes, dtype=dtype) for sizes in (shape, shape, shape[-1:]))
    assert_same(
        lambda *parts: torch.stack(functions.norm_beside(*parts, 1e-3, offset)),
        lambda x, weight: torch.stack([x, normed(x, weight)]),
        [x, weight],
        dtype,
    )
    assert_same(
        lambda *parts: torch.stack(functions.add_norm(*parts, 1e-3, offset)),
        lambda x, delta, weight: torch.stack([x + delta, normed(x + delta, weight)]),
        [x, delta, weight],
        dtype,
    )


@DTYPES
def test_a_sum_and_its_norm_are_the_same_bits_in_one_pass_and_in_two(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta, weight = (random(*sizes, dtype=dtype).detach() for sizes in ((70, 48), (70, 48), (48,)))
    total, result = functions.add_norm(x, delta, weight, 1e-3, 0.0)
    assert torch.equal(total, x + delta)
    assert torch.equal(result, functions.rms_norm(x + delta, weight, 1e-3, 0.0))


def test_a_gradient_that_does_not_come_is_none_of_the_sum() -> None:
    torch.manual_seed(0)
    x, delta, weight = (random(*sizes, dtype=torch.float32) for sizes in ((70, 48), (70, 48), (48,)))
    upstream = torch.randn(70, 48)
    total, result = functions.add_norm(x, delta, weight, 1e-3, 0.0)
    (alone,) = torch.autograd.grad(functions.rms_norm(x + delta, weight, 1e-3, 0.0), x, upstream)
    (through,) = torch.autograd.grad(result, x, upstream, retain_graph=True)
    around, of_delta, of_weight = torch.autograd.grad(total, (x, delta, weight), upstream, allow_unused=True)
    assert torch.equal(around, upstream) and torch.equal(of_delta, upstream) and of_weight is None
    torch.testing.assert_close(through, alone)


@DTYPES
def test_swiglu_is_its_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [random(3, 700, dtype=dtype, scale=4.0), random(3, 700, dtype=dtype)]
    assert_same(functions.swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up, inputs, dtype)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_is_that_of_transformers(dtype: torch.dtype, rows: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    cosines, sines = (random(1, 9, 12, dtype=dtype).detach() for _ in range(2))

    def formula(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, x, cosines.double(), sines.double(), unsqueeze_dim=2)[0]

    assert_same(lambda x: functions.rotate(x, cosines, sines), formula, [random(rows, 9, 3, 12, dtype=dtype)], dtype)


@DTYPES
@pytest.mark.parametrize("vocabulary", [3, 1000])
def test_cross_entropy_gives_losses_and_leaves_the_gradient(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits, weights = random(20, vocabulary, dtype=dtype, scale=5.0).detach(), torch.rand(20)
    targets = torch.randint(0, vocabulary, (20,))
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(0.7 * exact, targets, reduction="none") * weights
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    losses = functions.cross_entropy_(logits, targets, weights, 0.7)
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-5, atol=1e-6)
    assert float((logits.double() - gradient).norm() / gradient.norm()) < TOLERANCE[dtype]


def test_a_loss_of_logits_that_are_no_numbers_is_none() -> None:
    for broken in (float("nan"), float("inf")):
        logits = torch.zeros(2, 40)
        logits[1, 30] = broken
        losses = functions.cross_entropy_(logits, torch.tensor([3, 4]), torch.ones(2), 1.0)
        assert losses[0].isfinite() and losses[1].isnan()
