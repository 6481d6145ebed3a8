"""The loss of packed documents is the loss that transformers gives each of them alone, and so are its gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.backends.torch_engine.tiny_models import DENSE, FAMILIES, documents_of, random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy, check_head, cross_entropy
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.types import Pack

# float32 sums of some forty losses in two orders; measured 1e-7 to 2e-6 over all families.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def ours(model: nn.Module, pack: Pack, objective: CrossEntropy | None = None) -> Tensor:
    register_attention()
    model.set_attn_implementation(DOCUMENTS)
    return (objective or CrossEntropy())(model, to_device(pack, "cpu")).total


def plain(model: nn.Module, pack: Pack) -> Tensor:
    """Transformers' full logits of each document alone, under transformers' eager attention, and torch's own loss."""
    model.set_attn_implementation("eager")
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for document in documents_of(pack):
        ids = torch.from_numpy(document.ids).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total = total + (losses * torch.from_numpy(document.weights)[1:]).sum()
    return total


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_transformers_on_each_document_alone(family: str) -> None:
    model, pack = tiny_model(family), random_pack()
    expected = plain(model, pack)
    wanted = gradients(model, expected)
    total = ours(model, pack)
    found = gradients(model, total)
    torch.testing.assert_close(total, expected, **CLOSE)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_is_the_sum_of_each_document_alone(family: str) -> None:
    model, pack = tiny_model(family), random_pack()
    alone = sum(ours(model, document) for document in documents_of(pack))
    torch.testing.assert_close(ours(model, pack), alone, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_equal_weights_the_loss_is_the_one_transformers_computes_from_labels(family: str) -> None:
    model, pack = tiny_model(family), random_pack((23,), trained=1.1)
    pack = dataclasses.replace(pack, weights=(pack.weights > 0).astype(np.float32))
    total = ours(model, pack)
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(pack.ids).long()[None]
    torch.testing.assert_close(total, model(input_ids=ids, labels=ids).loss * 22, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_head_is_chosen_and_the_general_way_gives_the_same(family: str) -> None:
    model, pack = tiny_model(family), random_pack()
    objective, reason = cross_entropy(model)
    assert objective.through_head, reason
    torch.testing.assert_close(ours(model, pack), ours(model, pack, CrossEntropy(through_head=False)), **CLOSE)


@pytest.mark.parametrize("family", DENSE)
def test_another_first_document_leaves_the_loss_of_the_second_bit_equal(family: str) -> None:
    model = tiny_model(family)
    pack = random_pack((9, 8))
    weights = pack.weights.copy()
    weights[:9] = 0
    pack = dataclasses.replace(pack, weights=weights)
    other = dataclasses.replace(pack, ids=np.concatenate([random_pack((9,), seed=1).ids, pack.ids[9:]]))
    assert torch.equal(ours(model, pack), ours(model, other))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt2", "phi", "cohere")])
def test_nobody_looks_for_documents_in_the_positions_for_which_a_gpus_host_would_wait(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    def look(positions: Tensor) -> None:
        raise AssertionError("transformers looks for documents")

    model, pack = tiny_model(family), random_pack()
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    gradients(model, ours(model, pack))
    if family == "llama":  # without a mask it would look
        with pytest.raises(AssertionError, match="looks for documents"):
            ours(model, pack, CrossEntropy(through_head=False))


def test_doubling_a_weight_adds_that_tokens_loss_once_more() -> None:
    model, pack = tiny_model("llama"), random_pack()
    token = int(np.flatnonzero(pack.weights)[3])
    only = np.zeros_like(pack.weights)
    only[token] = pack.weights[token]
    doubled = ours(model, dataclasses.replace(pack, weights=pack.weights + only))
    single = ours(model, dataclasses.replace(pack, weights=only))
    torch.testing.assert_close(doubled, ours(model, pack) + single, **CLOSE)


def test_a_pack_without_trained_tokens_gives_a_zero_that_can_be_differentiated() -> None:
    model, pack = tiny_model("llama-tied"), random_pack()
    total = ours(model, dataclasses.replace(pack, weights=np.zeros_like(pack.weights)))
    found = gradients(model, total)
    assert total == 0 and total.dtype == torch.float32
    assert found and all(not gradient.any() for gradient in found.values())


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same_one() -> None:
    model, pack = tiny_model("llama"), random_pack()
    wanted = gradients(model, ours(model, pack))
    model.lm_head.weight.requires_grad_(False)
    found = gradients(model, ours(model, pack))
    assert wanted.keys() - found.keys() == {"lm_head.weight"}
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_the_sum_is_float32_for_a_bfloat16_model() -> None:
    model, pack = tiny_model("llama", torch.bfloat16), random_pack()
    total = ours(model, pack)
    exact = plain(tiny_model("llama"), pack)
    assert total.dtype == torch.float32
    # bfloat16 keeps 8 bits: about 0.4 % per number, and the weights themselves are rounded.
    torch.testing.assert_close(total, exact, rtol=3e-2, atol=0)


def test_a_head_with_arithmetic_of_its_own_is_noticed_and_runs_the_whole_model() -> None:
    class Sharpened(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model, pack = tiny_model("llama"), random_pack()
    before = plain(model, pack).detach()
    model.__class__ = Sharpened
    objective, reason = cross_entropy(model)
    assert not objective.through_head and "Sharpened" in str(reason)
    torch.testing.assert_close(ours(model, pack, objective), plain(model, pack), **CLOSE)
    assert (plain(model, pack).detach() - before).abs() > 1


def test_a_scale_left_out_of_the_table_is_noticed() -> None:
    model = tiny_model("granite")
    assert check_head(model) is None
    model.config.model_type = "unheard_of"
    assert "does more than multiply by a matrix" in str(check_head(model))


def test_evaluation_and_training_mode_survive_the_check() -> None:
    model = tiny_model("llama")
    check_head(model)
    assert model.training
    check_head(model.eval())
    assert not model.training
