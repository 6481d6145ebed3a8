"""The memory estimate is what tensors really take, on models of many families, though no weight is looked at."""

from __future__ import annotations

import pytest
import torch

from tests.backends.torch_engine.tiny_models import FAMILIES, VOCABULARY, random_pack, tiny_config, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.fused.swap import swap
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.objectives.head import find_head
from training_hub.backends.torch_engine.optim import build_optimizer
from training_hub.backends.torch_engine.planning.kept import Ways, id_of, kept_bytes
from training_hub.backends.torch_engine.planning.memory import GIB, blank_like, estimate
from training_hub.backends.torch_engine.planning.of_optimizers import STATES, optimizer_numbers
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.recipe.sections import Optimizer

CPU = torch.device("cpu")
LENGTHS = (40, 24, 40, 24)
# Experts are chosen by what tokens say, and attention that is spelled out keeps its scores: neither has one size.
SAME_SIZE = [name for name in FAMILIES if name not in ("gemma2", "mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3")]


def really_saved(model, pack) -> int:
    """Bytes that autograd keeps in a forward pass of the objective, the weights not counted."""
    own = {id_of(parameter) for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        if id_of(tensor) not in own:
            saved[id_of(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CrossEntropy(through_head=find_head(model) is not None)(model, to_device(pack, CPU))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", SAME_SIZE)
def test_activations_are_what_autograd_keeps(family: str, dtype: torch.dtype):
    register_attention()
    model = tiny_model(family, dtype)
    model.set_attn_implementation(DOCUMENTS)
    pack = random_pack(LENGTHS)
    on_kernels = kernels() is not None
    if on_kernels:
        swap(model)
    predicted = kept_bytes(blank_like(tiny_model(family)).to(dtype), pack, Ways(is_copied=True, on_kernels=on_kernels))
    # Fused attention also keeps a number per query and head, and pads widths as small as these; found up to 7.6 %.
    assert predicted.forward == pytest.approx(really_saved(model, pack), rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_estimate_or_a_reason(family: str):
    found = estimate(tiny_model(family), Optimizer(), torch.float32, CPU, random_pack(LENGTHS))
    assert (found["activations"] is None) == bool(found["note"])
    always = sum(found[name] for name in ("libraries", "weights", "masters", "optimizer", "gaps"))
    least = always + found["gradients"] + (found["activations"] or 0)
    assert least <= found["total"] <= least + most_beside(found)


def most_beside(found) -> float:
    """GiB that come to activations and gradients: a chunk of logits at the end of forward, or the head's gradient and
    half of one of two layers in backward."""
    return max(found["logits"], 4 * VOCABULARY * 32 / GIB + (found["activations"] or 0) / 4)


def test_gradients_and_activations_of_a_single_pack_are_not_there_at_once():
    model, pack = tiny_model("llama"), random_pack(LENGTHS)
    found = estimate(model, Optimizer(), torch.float32, CPU, pack, accumulates=False)
    always = sum(found[name] for name in ("libraries", "weights", "masters", "optimizer", "gaps"))
    fullest = max(found["activations"] + found["logits"], found["gradients"])
    assert always + fullest <= found["total"] <= always + fullest + most_beside(found)
    assert found["total"] < estimate(model, Optimizer(), torch.float32, CPU, pack)["total"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", [*STATES, "Adafactor"])
def test_optimizer_state_is_what_torch_keeps(name: str, momentum: float):
    settings = Optimizer(name=name, momentum=momentum)
    weights = {"a": torch.randn(6, 4), "b": torch.randn(5), "c": torch.randn(2, 3, 4)}
    for weight in weights.values():
        weight.requires_grad_().grad = torch.ones_like(weight)
    optimizer = build_optimizer(weights, settings)
    optimizer.step()
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert optimizer_numbers(weights.values(), settings) == kept


def test_low_precision_brings_masters_and_gradients_in_float32():
    model = tiny_model("llama")
    count = sum(p.numel() for p in model.parameters())
    found = estimate(model, Optimizer(), torch.bfloat16, CPU, random_pack(LENGTHS))
    sizes = {name: found[name] * GIB / count for name in ("weights", "masters", "gradients", "optimizer")}
    assert sizes == {"weights": 2, "masters": 4, "gradients": 4, "optimizer": 8}


def test_the_model_that_is_asked_about_stays_as_it_is():
    model = tiny_model("qwen3")
    before = (model.config.to_dict(), model.config._attn_implementation, model.training)
    estimate(model, Optimizer(), torch.bfloat16, CPU, random_pack(LENGTHS))
    assert (model.config.to_dict(), model.config._attn_implementation, model.training) == before
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tiny_config("qwen3").hidden_size == 32
