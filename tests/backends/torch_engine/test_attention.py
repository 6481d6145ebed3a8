"""Attention per document against attention spelled out with a mask over the whole pack."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, documents_attention, register_attention
from training_hub.errors import BackendError

LENGTHS = (5, 9, 5, 1)


class Layer(nn.Module):
    is_causal = True


def inputs(heads: int = 4, kv_heads: int = 2, width: int = 8, value_width: int = 8) -> list[Tensor]:
    """query, key, value in float64, laid out in memory as models lay them out: [1, T, heads, width] transposed."""
    torch.manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return [
        torch.randn(1, sum(LENGTHS), *shape, dtype=torch.float64).transpose(1, 2).detach().requires_grad_()
        for shape in shapes
    ]


def spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at = torch.arange(len(document))
    sees = (document[:, None] == document) & (at[:, None] >= at) & (at[:, None] - at < (window or 10**6))
    exponentials = scores.masked_fill(~sees, float("-inf")).exp()
    sink = 0 if s_aux is None else s_aux.exp().reshape(1, -1, 1, 1)
    shares = exponentials / (exponentials.sum(-1, keepdim=True) + sink)
    return (shares @ value.repeat_interleave(repeats, 1)).transpose(1, 2)


CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({"kv_heads": 4}, {}),
    "grouped": ({}, {}),
    "one key head": ({"kv_heads": 1}, {}),
    "window": ({}, {"sliding_window": 3}),
    "window of one": ({"kv_heads": 4}, {"sliding_window": 1}),
    "narrow values": ({"value_width": 6}, {}),
    "wide values": ({"value_width": 12}, {}),
    "softcap": ({}, {"softcap": 1.5}),
    "softcap and window": ({}, {"softcap": 1.5, "sliding_window": 3}),
    "sinks": ({}, {"s_aux": torch.linspace(-1, 1, 4, dtype=torch.float64)}),
    "bias": ({}, {"position_bias": torch.linspace(-2, 2, 1600, dtype=torch.float64).reshape(1, 4, 20, 20).sin()}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_document_attends_to_itself_alone(case: str) -> None:
    shape, options = CASES[case]
    tensors = inputs(**shape)
    names = {"sliding_window": "window", "position_bias": "bias"}
    expected = spelled_out(*tensors, scaling=0.3, **{names.get(name, name): value for name, value in options.items()})
    found, _ = documents_attention(Layer(), *tensors, None, scaling=0.3, document_lengths=LENGTHS, **options)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for gradient, right in zip(torch.autograd.grad((found * direction).sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, right)


def test_without_lengths_every_row_is_one_document() -> None:
    query, key, value = (torch.cat([part, part.flip(2)]) for part in inputs())
    both, _ = documents_attention(Layer(), query, key, value, None)
    for row in (0, 1):
        alone, _ = documents_attention(Layer(), query[row : row + 1], key[row : row + 1], value[row : row + 1], None)
        torch.testing.assert_close(both[row : row + 1], alone)


def test_no_matrix_over_the_whole_pack_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for made in result if isinstance(result, tuple) else (result,):
                self.elements = max(self.elements, made.numel() if isinstance(made, Tensor) else 0)
            return result

    lengths = (64,) * 16 + (65,)
    query, key, value = (torch.randn(1, 1, sum(lengths), 8) for _ in range(3))
    with Largest() as seen:
        documents_attention(Layer(), query, key, value, None, document_lengths=lengths)
    assert seen.elements < sum(lengths) ** 2 / 8


def test_dropout_is_applied_to_shares_in_both_ways() -> None:
    query, key, value = inputs()
    for options in ({}, {"softcap": 5.0}):
        torch.manual_seed(1)
        dropped, _ = documents_attention(
            Layer(), query, key, value, None, dropout=0.5, document_lengths=LENGTHS, **options
        )
        whole, _ = documents_attention(Layer(), query, key, value, None, document_lengths=LENGTHS, **options)
        assert not torch.allclose(dropped, whole)
        # The first token sees itself alone: its share is dropped to 0 or doubled.
        ratio = (dropped[0, 0] / whole[0, 0]).flatten()
        assert all(min(abs(each), abs(each - 2)) < 1e-9 for each in ratio.tolist())


def test_attention_to_later_tokens_is_refused() -> None:
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(BackendError, match="looks at later tokens"):
        documents_attention(layer, *inputs(), None)


def test_lengths_with_several_rows_are_refused() -> None:
    query, key, value = (torch.cat([part, part]) for part in inputs())
    with pytest.raises(ValueError, match="describes one row, but the batch has 2"):
        documents_attention(Layer(), query, key, value, None, document_lengths=LENGTHS)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_model_still_generates_with_padding_and_cache(family: str) -> None:
    register_attention()
    model = tiny_model(family).eval()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (prompts > 0).long()
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    model.set_attn_implementation("eager")
    expected = model.generate(prompts, **settings)
    model.set_attn_implementation(DOCUMENTS)
    assert torch.equal(model.generate(prompts, **settings), expected)


def test_padding_with_sinks_is_refused_rather_than_computed_without_them() -> None:
    register_attention()
    model = tiny_model("gpt-oss").eval()
    model.set_attn_implementation(DOCUMENTS)
    with pytest.raises(BackendError, match=r"sinks.*eager"):
        model(input_ids=torch.tensor([[0, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window, kv_heads, value_width", list(itertools.product((None, 3), (4, 2), (8, 16))))
def test_the_variable_length_kernel_agrees_with_one_call_per_document(
    window: int | None, kv_heads: int, value_width: int
) -> None:
    from training_hub.backends.torch_engine.attention import varlen_attention, varlen_problem

    assert varlen_problem(torch.device("cuda"), torch.bfloat16) is None
    tensors = [
        part.detach().to("cuda", torch.bfloat16).requires_grad_() for part in inputs(4, kv_heads, 16, value_width)
    ]
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"scaling": 0.3, "document_lengths": LENGTHS, "sliding_window": window}
    expected, _ = documents_attention(Layer(), *[part.float() for part in tensors], None, **options)
    found, _ = varlen_attention(Layer(), *tensors, None, cu_seq_lens_q=borders, max_length_q=max(LENGTHS), **options)
    # bfloat16 keeps 8 bits; outputs are averages of numbers of size 1.
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for gradient, right in zip(torch.autograd.grad((found.float() * direction).sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(gradient.float(), right.float(), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_loss_on_a_gpu_is_that_on_the_cpu() -> None:
    from tests.backends.torch_engine.tiny_models import random_pack
    from training_hub.backends.torch_engine.attention import VARLEN
    from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
    from training_hub.backends.torch_engine.tensors import to_device

    register_attention()
    pack = random_pack()
    losses = {}
    for device, dtype, attention in (("cpu", torch.float32, DOCUMENTS), ("cuda", torch.float32, DOCUMENTS),
                                     ("cuda", torch.bfloat16, VARLEN)):  # fmt: skip
        model = tiny_model("qwen3", dtype).to(device)
        model.set_attn_implementation(attention)
        total = CrossEntropy()(model, to_device(pack, device)).total
        total.backward()
        losses[device, dtype] = float(total.detach())
    exact = losses["cpu", torch.float32]
    assert losses["cuda", torch.float32] == pytest.approx(exact, rel=1e-4)
    assert losses["cuda", torch.bfloat16] == pytest.approx(exact, rel=3e-2)
