"""Products by our own kernel are exact to rounding in every layout, add to float32 sums, and keep a run's promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.backends.torch_engine.tiny_models import from_config, random_pack, tiny_config
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.checkpointing import checkpoint_layers, is_kept
from training_hub.backends.torch_engine.fused import onednn, panels
from training_hub.backends.torch_engine.fused.products import (
    add_product_,
    hold_gradient,
    linear,
    multiply,
    multiply_into_,
    product,
)
from training_hub.backends.torch_engine.fused.swap import run_on_kernels
from training_hub.backends.torch_engine.objectives.head import Head
from training_hub.backends.torch_engine.tensors import to_device

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""As a share of the largest number: sums in float32 in another order, and one rounding to 8 bits of mantissa."""

pytestmark = pytest.mark.skipif(panels.problem(torch.float32) is not None, reason=str(panels.problem(torch.float32)))
FORMATS = [torch.float32]
if panels.problem(torch.bfloat16) is None:
    FORMATS.append(torch.bfloat16)


@pytest.fixture(autouse=True)
def fastest(monkeypatch):
    """As on a processor on which no library is faster, whichever this is."""
    monkeypatch.setattr(panels, "is_trusted", lambda dtype: dtype in FORMATS)
    monkeypatch.setattr(onednn, "is_trusted", lambda: False)


def apart(one, other) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def matrices(dtype: torch.dtype, rows: int = 301, inner: int = 514, columns: int = 176):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in ((rows, inner), (inner, columns)))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("is_left_turned", [True, False])
@pytest.mark.parametrize("is_right_turned", [True, False])
@pytest.mark.parametrize("sides", [(301, 514, 176), (90, 2600, 48), (64, 4500, 80)])  # one stretch of K, and several
def test_matrices_may_lie_in_any_way(dtype, is_left_turned: bool, is_right_turned: bool, sides) -> None:
    left, right = matrices(dtype, *sides)
    left = left.T.contiguous().T if is_left_turned else left
    right = right.T.contiguous().T if is_right_turned else right
    wanted = left.double() @ right.double()
    assert panels.pays(left, right)
    assert apart(multiply(left, right), wanted) < CLOSE[dtype]
    place = left.new_empty(len(left), right.shape[1])
    multiply_into_(place, left, right)
    assert torch.equal(place, multiply(left, right))
    in_float32 = product(left, right)
    assert in_float32.dtype == torch.float32 and apart(in_float32, wanted) < CLOSE[torch.float32]
    total = torch.randn(*wanted.shape)
    before = total.double()
    add_product_(total, left, right)
    assert apart(total, before + wanted) < CLOSE[torch.float32]


@pytest.mark.parametrize("dtype", FORMATS)
def test_an_odd_number_of_tokens_has_gradients_of_weights_too(dtype) -> None:
    upstream, x = (torch.randn(301, width).to(dtype) for width in (176, 336))
    assert panels.pays(upstream.T, x)
    assert apart(product(upstream.T, x), upstream.double().T @ x.double()) < CLOSE[torch.float32]
    part = slice(3, 290)  # rows of a larger matrix
    assert apart(product(upstream[part].T, x[part]), upstream[part].double().T @ x[part].double()) < 2e-6


@pytest.mark.parametrize("dtype", FORMATS)
def test_threads_and_neighbouring_rows_change_no_bit(dtype) -> None:
    left, right = matrices(dtype, 403)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append((multiply(left, right), product(left, right)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for some in found[1:] for one, other in zip(found[0], some, strict=True))
    assert torch.equal(multiply(left[100:], right), found[0][0][100:])


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_not_a_number_stays_so(dtype) -> None:
    left, right = matrices(dtype)
    left[7, 11], left[300, 513] = float("nan"), float("inf")
    made = multiply(left, right)
    assert made[7].isnan().all() and not made[300].isfinite().any()
    assert made[:7].isfinite().all() and made[8:300].isfinite().all()


def test_other_matrices_are_left_to_torch() -> None:
    left, right = matrices(torch.float32)
    others = [
        (left.double(), right.double()),
        (left, right.bfloat16()),
        (left, right[:, :170]),  # no multiple of the columns that are made at once
        (left[:, ::2], right[::2]),  # neither side contiguous
        (left[:40, :40], right[:40]),  # small
        (left[:1].expand(301, -1), right),  # one row in many places
    ]
    if torch.bfloat16 in FORMATS:
        others.append((left[:, :513].bfloat16(), right[:513].bfloat16()))  # half a pair
    assert panels.pays(left, right)
    for one, other in others:
        assert not panels.pays(one, other)
    for one, other in others[2:]:
        assert torch.equal(multiply(one, other), one @ other)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("is_biased", [True, False])
def test_outputs_and_gradients_are_those_of_torch_to_rounding(dtype, is_biased: bool) -> None:
    torch.manual_seed(0)
    made_of = [torch.randn(size).to(dtype) for size in ((2, 300, 512), (768, 512), (768,))]
    upstream, found = torch.randn(2, 300, 768).to(dtype), []
    for multiplies in (linear, nn.functional.linear):
        mine = [one.clone().requires_grad_() for one in made_of]
        y = multiplies(mine[0], mine[1], mine[2] if is_biased else None)
        y.backward(upstream)
        found.append([y.detach(), *(one.grad for one in mine if one.grad is not None)])
    assert len(found[0]) == len(found[1]) == (4 if is_biased else 3)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert apart(ours, theirs) < 2 * CLOSE[dtype]  # both are rounded


@pytest.mark.skipif(torch.bfloat16 not in FORMATS, reason="this processor does not multiply bfloat16")
def test_the_gradient_of_a_bfloat16_weight_meets_its_float32_sum_unrounded() -> None:
    torch.manual_seed(0)
    weight, holder, wanted = nn.Parameter(torch.randn(768, 512).bfloat16()), torch.zeros(768, 512), 0.0
    hold_gradient(weight, holder)
    for _ in range(2):
        x, upstream = torch.randn(600, 512).bfloat16(), torch.randn(600, 768).bfloat16()
        linear(x, weight).backward(upstream)
        wanted = wanted + upstream.double().T @ x.double()
    assert weight.grad is None and holder.grad is not None
    assert apart(holder.grad, wanted) < CLOSE[torch.float32]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_head_finds_the_same_loss_and_gradients(dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 128).to(dtype), (torch.randn(2048, 128) / 16).to(dtype)
    targets, found = torch.randint(0, 2048, (700,)), []
    for trusted in (FORMATS, []):
        monkeypatch.setattr(panels, "is_trusted", lambda dtype, trusted=trusted: dtype in trusted)
        mine, table = hidden.clone().requires_grad_(), nn.Parameter(weight.clone())
        loss = Head(table).loss(mine, targets, torch.ones(700))
        loss.backward()
        found.append((loss.detach(), mine.grad, table.grad))
    assert all(apart(ours, theirs) < 5 * CLOSE[dtype] for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_a_model_learns_the_same_and_remembers_products_where_it_forgets_the_rest(how: str, monkeypatch) -> None:
    register_attention()
    config = tiny_config("llama", hidden_size=256, intermediate_size=768, initializer_range=0.05)
    one, found, counted = to_device(random_pack((150, 90, 160)), "cpu"), [], []
    own = panels._multiply
    monkeypatch.setattr(panels, "_multiply", lambda *given, **named: counted.append(given) or own(*given, **named))
    for is_ours in (True, False):
        model = from_config(config).train()
        model.set_attn_implementation(DOCUMENTS)
        if is_ours:
            assert run_on_kernels(model) is None
            checkpoint_layers(model, how)
            counted.clear()
        model(input_ids=one.ids, position_ids=one.positions, use_cache=False).logits.square().mean().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    # Two layers of norms and attention on top of products: 1e-4, as in every comparison of models in float32.
    assert all(apart(found[0][name], gradient) < 1e-4 for name, gradient in found[1].items())
    # Seven matrices of two layers, forward and for two gradients; forward once more where products are forgotten.
    assert len(counted) == 2 * 7 * (4 if how == "full" else 3)
    assert is_kept(torch.ops.training_hub.mm.default)


def test_where_the_kernels_are_not_built_it_is_not_trusted(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(panels, "kernels", lambda: None)
    monkeypatch.setattr(panels, "is_slow_for_mkl", lambda: True)
    panels.problem.cache_clear()
    panels.is_trusted.cache_clear()
    try:
        assert panels.problem(torch.float32) == "it is not built" and not panels.is_trusted(torch.float32)
        assert not panels.is_trusted(torch.float64)
    finally:
        panels.problem.cache_clear()
        panels.is_trusted.cache_clear()
