"""Adapters in one function: the numbers of PEFT's layers, with fewer passes."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.checkpointing import checkpoint_layers
from training_hub.backends.torch_engine.fused.low_rank import project, run_adapters_fused
from training_hub.backends.torch_engine.fused.swap import OnKernels, multiply_in_eight_bits, swap
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.tensors import to_device

peft = pytest.importorskip("peft")

# Sums in another order, over a few layers.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5}


def adapted(family: str, dtype: torch.dtype, **options) -> torch.nn.Module:
    model = tiny_model(family, dtype, initializer_range=0.1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return model


def loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    torch.manual_seed(0)
    total = CrossEntropy()(model, to_device(random_pack((9, 4, 12)), "cpu")).total
    total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()), found


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_the_fused_layers_are_pefts_to_rounding(family, dtype):
    theirs = adapted(family, dtype)
    ours = copy.deepcopy(theirs)
    swap(theirs)
    swap(ours)
    run_adapters_fused(ours)
    assert sum(isinstance(m, OnKernels) and hasattr(m, "lora_A") for m in ours.modules()) == sum(
        hasattr(m, "lora_A") for m in theirs.modules()
    )
    (loss, gradients), (wanted, theirs_gradients) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == pytest.approx(wanted, rel=CLOSE[dtype])
    assert gradients.keys() == theirs_gradients.keys()
    assert all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        other = theirs_gradients[name]
        assert (gradient - other).norm() <= CLOSE[dtype] * other.norm(), name


def test_in_bfloat16_they_are_no_further_from_the_truth_than_pefts():
    exact = adapted("llama", torch.float64)
    _, truth = loss_and_gradients(exact)
    theirs = copy.deepcopy(exact).to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    run_adapters_fused(ours)
    errors = []
    for model in (ours, theirs):
        _, found = loss_and_gradients(model)
        errors.append(sum(float((found[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth))
    # Fewer roundings; which way those that are left go is chance.
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] / len(truth) < 0.1


def test_beside_products_in_8_bits_the_layers_are_pefts_too():
    torch.manual_seed(0)
    plain = torch.nn.ModuleDict({name: torch.nn.Linear(64, size, name == "b") for name, size in (("a", 48), ("b", 32))})
    config = peft.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False)
    x, upstream = torch.randn(20, 64), torch.randn(20, 48 + 32)
    found = []
    for in_eight_bits, is_fused in ((True, True), (True, False), (False, True)):
        model = copy.deepcopy(plain)
        if in_eight_bits:
            assert multiply_in_eight_bits(model) == 2
        torch.manual_seed(1)
        layers = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model
        if is_fused:
            run_adapters_fused(layers)
        given = x.clone().requires_grad_()
        made = torch.cat(project(given, (layers["a"], layers["b"])), -1)
        made.backward(upstream)
        found.append([made.detach(), given.grad, *(p.grad for p in layers.parameters() if p.requires_grad)])
    for ours, theirs in zip(*found[:2], strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert all((found[0][place] - found[2][place]).norm() > 1e-3 * found[2][place].norm() for place in (0, 1))


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_layers_that_forget_make_the_same_again(family, how):
    model = adapted(family, torch.float64)
    swap(model)
    run_adapters_fused(model)
    loss, gradients = loss_and_gradients(model)
    assert checkpoint_layers(model, how)
    again, others = loss_and_gradients(model)
    # Selective keeps a product as it was, so the parts of a sum are added in the other order.
    assert again == pytest.approx(loss, rel=CLOSE[torch.float64])
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= CLOSE[torch.float64] * gradient.norm(), name


def test_finite_differences_agree():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(6, size, name == "b") for name, size in (("a", 4), ("b", 3))})
    config = peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False)
    inside = peft.get_peft_model(model.double(), config, autocast_adapter_dtype=False).base_model.model
    run_adapters_fused(inside)
    weights = [p for p in inside.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *given: tuple(project(given[0], (inside["a"], inside["b"]))), (x, *weights))
    # A layer whose output nobody uses has no gradient, and disturbs no other.
    project(x, (inside["a"], inside["b"]))[1].sum().backward()
    unused = inside["a"].lora_B["default"].weight.grad
    assert unused is None or not unused.any()
    assert inside["b"].lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_dora_is_pefts_to_rounding(family, dropout):
    theirs = adapted(family, torch.float64, use_dora=True, lora_dropout=dropout, fan_in_fan_out=family == "gpt2")
    ours = copy.deepcopy(theirs)
    run_adapters_fused(ours)
    assert all(isinstance(module, OnKernels) for module in ours.modules() if hasattr(module, "lora_A"))
    (loss, gradients), (wanted, theirs_gradients) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == pytest.approx(wanted, rel=CLOSE[torch.float64])
    assert gradients.keys() == theirs_gradients.keys()
    for name, other in theirs_gradients.items():
        assert (gradients[name] - other).norm() <= CLOSE[torch.float64] * other.norm(), name


def test_dropout_is_left_to_peft():
    theirs = adapted("llama", torch.float64, lora_dropout=0.3)
    ours = copy.deepcopy(theirs)
    run_adapters_fused(ours)
    (loss, gradients), (wanted, theirs_gradients) = loss_and_gradients(ours), loss_and_gradients(theirs)
    assert loss == wanted
    assert all(torch.equal(gradients[name], theirs_gradients[name]) for name in theirs_gradients)


def test_an_adapter_that_is_switched_off_does_nothing():
    model = adapted("llama", torch.float64)
    run_adapters_fused(model)
    ids = torch.arange(9)[None]
    with_adapter = model(ids).logits
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    assert (model(ids).logits - with_adapter).abs().max() > 1e-3
