"""What runs on a GPU alone: kernels in Triton, the choice of attention, a step in which the host waits for nothing."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, FUNCTIONS, VARLEN, register_attention
from training_hub.backends.torch_engine.attention_trial import Heads, told, try_each
from training_hub.backends.torch_engine.checkpointing import HOW, OFFLOAD, checkpoint_layers
from training_hub.backends.torch_engine.fused.swap import OnKernels, run_on_kernels
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.saving.staging import Staging
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.recipe.sections import Optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

GPU = torch.device("cuda")
LENGTHS = (40, 24, 40, 24)


def on_gpu(family: str, dtype: torch.dtype):
    register_attention()
    model = tiny_model(family, dtype).to(GPU)
    model.set_attn_implementation(VARLEN if dtype == torch.bfloat16 else DOCUMENTS)
    return model.train()


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    loss = CrossEntropy()(model, to_device(random_pack(LENGTHS), GPU)).total
    loss.backward()
    return float(loss.detach()), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@needs_triton
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mistral"])
def test_triton_kernels_leave_loss_and_gradients(family):
    loss, gradients = loss_and_gradients(on_gpu(family, torch.float32))
    model = on_gpu(family, torch.float32)
    assert run_on_kernels(model) is None
    assert any(isinstance(module, OnKernels) for module in model.modules())
    other, found = loss_and_gradients(model.train())
    assert other == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6


def test_offloading_keeps_less_on_the_device_than_full_checkpointing_and_the_same_numbers():
    found, kept = {}, {}
    for how in ("full", OFFLOAD):
        model = on_gpu("llama", torch.float32)
        assert checkpoint_layers(model, how)
        before = torch.cuda.memory_allocated()
        loss = CrossEntropy()(model, to_device(random_pack(LENGTHS), GPU)).total
        kept[how] = torch.cuda.memory_allocated() - before
        loss.backward()
        found[how] = [loss.detach(), *(p.grad for p in model.parameters())]
    assert kept[OFFLOAD] < kept["full"]
    assert all(torch.equal(one, other) for one, other in zip(found["full"], found[OFFLOAD], strict=True))


@pytest.mark.parametrize("keeps", [False, True])
def test_copies_for_a_checkpoint_are_of_the_numbers_before_the_next_update(keeps):
    state = {"w": torch.arange(2**22, dtype=torch.float32, device=GPU), "step": torch.tensor(3.0)}
    wanted = {name: tensor.cpu().clone() for name, tensor in state.items()}
    staging = Staging(GPU, keeps=keeps)
    for _ in range(3):
        copies = staging.copy("model", state)
        staging.hold_device()
        for tensor in state.values():
            tensor.add_(1)
        staging.wait()
        assert all(torch.equal(copies[name], wanted[name]) for name in wanted)
        assert all(copy.device.type == "cpu" for copy in copies.values())
        wanted = {name: tensor + 1 for name, tensor in wanted.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_checkpointing_leaves_the_loss(dtype):
    losses = []
    for how in HOW:
        model = on_gpu("llama", dtype)
        run_on_kernels(model)
        assert checkpoint_layers(model.train(), how)
        losses.append(loss_and_gradients(model)[0])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_less_optimizer_state_moves_weights_as_full_state_does(state):
    def moved(kept: str) -> dict[str, torch.Tensor]:
        model = on_gpu("llama", torch.bfloat16)
        masters = Masters(model.named_parameters(), are_split=kept != "full")
        updater = Updater(masters, Optimizer(state=kept), max_norm=1.0)
        for step in range(5):
            torch.manual_seed(step)
            for weight in masters.weights.values():
                weight.grad = torch.randn(weight.shape, device=GPU)
            updater.clip()
            updater.step(1e-3)
        return {name: masters.exact(name).clone() for name in masters.weights}

    full, small = moved("full"), moved(state)
    for name, weight in full.items():
        # Five steps of 1e-3; moments in bytes are a few percent off, split masters only by rounding.
        assert float((small[name] - weight).abs().max()) < (1e-6 if state == "split" else 1e-3)


def test_an_attention_is_found_and_every_other_is_explained():
    trials = try_each(FUNCTIONS, Heads(8, 2, 64), [200] * 40, GPU, torch.bfloat16)
    assert trials[0].seconds is not None, told(trials)
    assert all(trial.problem for trial in trials if trial.seconds is None)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("state", ["full", "split", "8bit"])
def test_the_host_waits_for_nothing_between_the_packs_of_a_step_and_its_update(state):
    model = on_gpu("llama", torch.bfloat16)
    run_on_kernels(model)
    updater = Updater(Masters(model.train().named_parameters(), are_split=state != "full"), Optimizer(state=state), 1.0)

    def step() -> None:
        for _ in range(2):
            CrossEntropy()(model, to_device(random_pack(LENGTHS), GPU)).total.backward()
        updater.clip()
        updater.step(1e-3)

    step()  # builds kernels and state
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
