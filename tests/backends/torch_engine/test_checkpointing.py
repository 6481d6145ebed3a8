"""Activation checkpointing changes memory and time, never a number."""

from __future__ import annotations

import pytest
import torch

from tests.backends.torch_engine.planning.test_memory import really_saved
from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.checkpointing import (
    HOW,
    OFFLOAD,
    checkpoint_layers,
    free_gib,
    num_layers,
    way_problem,
)
from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.fused.swap import swap
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.planning.kept import Ways, kept_bytes
from training_hub.backends.torch_engine.planning.memory import blank_like
from training_hub.backends.torch_engine.tensors import to_device

CPU = torch.device("cpu")
LENGTHS = (40, 24, 40, 24)
FAMILIES = ("llama-tied", "qwen3", "gemma", "gpt2", "mixtral")


def ready(family: str, how: str, dtype: torch.dtype = torch.float32, *, swapped: bool = True, **changes: int):
    register_attention()
    model = tiny_model(family, dtype, **changes)
    model.set_attn_implementation(DOCUMENTS)
    if swapped and kernels() is not None:
        swap(model)
    assert checkpoint_layers(model, how)
    return model.train()


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    loss = CrossEntropy()(model, to_device(random_pack(LENGTHS), CPU)).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("swapped", [True, False], ids=["our kernels", "torch's operators"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_keep_every_bit(family, dtype, swapped):
    loss, gradients = loss_and_gradients(ready(family, "none", dtype, swapped=swapped))
    for how in (*HOW[1:], OFFLOAD):
        other, found = loss_and_gradients(ready(family, how, dtype, swapped=swapped))
        assert torch.equal(other, loss)
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_dropout_is_drawn_again_as_it_was():
    def with_dropout(how: str):
        model = ready("gpt2", how, swapped=False)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        return loss_and_gradients(model)

    loss, gradients = with_dropout("none")
    other, found = with_dropout("full")
    assert torch.equal(other, loss) and not torch.equal(loss, loss_and_gradients(ready("gpt2", "none"))[0])
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


class Ran(torch.utils._python_dispatch.TorchDispatchMode):
    """How often forward and backward multiplied matrices."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.products += str(operation).startswith(("aten.mm", "aten.addmm"))
        return operation(*arguments, **(options or {}))


def test_selective_multiplies_nothing_twice_and_full_does():
    products = {}
    for how in HOW:
        model = ready("llama-tied", how)
        with Ran() as ran:
            loss_and_gradients(model)
        products[how] = ran.products
    assert products["selective"] == products["none"] < products["full"]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_what_waits_in_the_hosts_memory_is_the_input_of_each_layer_and_nothing_else(family):
    """Hooks that count stand in for those that copy from a GPU: what they are given, and asked for, is the same."""
    went: list[torch.Tensor] = []
    came: list[torch.Tensor] = []

    def away():
        def pack(tensor):
            went.append(tensor.clone())
            return went[-1]

        def unpack(tensor):
            came.append(tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    loss, gradients = loss_and_gradients(ready(family, "none"))
    model = ready(family, "none")
    layers, width = num_layers(model), model.config.hidden_size
    checkpoint_layers(model, OFFLOAD, away=away)
    other, found = loss_and_gradients(model)
    # torch 2.11 keeps an empty tensor beside each.
    went, came = ([tensor for tensor in some if tensor.numel()] for some in (went, came))
    assert [tuple(tensor.shape) for tensor in went] == [(1, sum(LENGTHS), width)] * layers
    assert [id(tensor) for tensor in came] == [id(tensor) for tensor in reversed(went)]
    assert torch.equal(other, loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_offloading_is_estimated_to_keep_the_inputs_of_layers_less_than_full_does():
    deep = tiny_model("llama", num_hidden_layers=8)
    full, offload = (
        kept_bytes(blank_like(deep), random_pack(LENGTHS), Ways(is_copied=False), checkpointing=how).all
        for how in ("full", OFFLOAD)
    )
    inputs = 8 * sum(LENGTHS) * deep.config.hidden_size * 4
    # Beside what is kept both have what one of eight layers makes again: everything less what is kept.
    assert full - offload == pytest.approx(inputs * (1 - 1 / 8), rel=1e-3)


def test_there_must_be_a_gpu_to_keep_less_on():
    assert way_problem("full", CPU) is None
    assert "no GPU here" in str(way_problem(OFFLOAD, CPU))


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_what_autograd_keeps_with_full_checkpointing_is_what_is_estimated(family):
    everything = really_saved(ready(family, "none", num_hidden_layers=8), random_pack(LENGTHS))
    kept = really_saved(ready(family, "full", num_hidden_layers=8), random_pack(LENGTHS))
    ways = Ways(is_copied=True, on_kernels=kernels() is not None)
    blank = blank_like(tiny_model(family, num_hidden_layers=8))
    predicted = kept_bytes(blank, random_pack(LENGTHS), ways, checkpointing="full")
    assert predicted.forward == pytest.approx(kept, rel=0.1)
    # What one of eight layers made is there again in its turn, and gradients of half of what it keeps there.
    assert predicted.again == pytest.approx((everything - kept + everything / 2) / 8, rel=0.1)


@pytest.mark.parametrize("on_kernels", [True, False])
def test_each_way_is_estimated_to_take_less_than_the_one_before(on_kernels):
    deep, ways = tiny_model("llama", num_hidden_layers=8), Ways(is_copied=False, on_kernels=on_kernels)
    sizes = [kept_bytes(blank_like(deep), random_pack(LENGTHS), ways, checkpointing=how).all for how in HOW]
    assert sizes[0] > sizes[1] > sizes[2]


def test_free_memory_is_what_the_machine_has_at_most():
    free = free_gib(CPU)
    assert free is None or 0 < free < 2**20
