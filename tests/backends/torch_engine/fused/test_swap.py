"""Models on the kernels say, learn and are called what they did before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.backends.torch_engine.tiny_models import DENSE, random_pack, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.fused import functions, onednn, panels
from training_hub.backends.torch_engine.fused.build import kernels, kernels_problem
from training_hub.backends.torch_engine.fused.swap import OnKernels, run_on_kernels, swap, swap_back
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy, cross_entropy, decoder_states
from training_hub.backends.torch_engine.tensors import to_device

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {kernels_problem()}")


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return learned(model, cross_entropy(model)[0])


def learned(
    model: torch.nn.Module, objective: CrossEntropy = CrossEntropy()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    total = objective(model, to_device(random_pack(), "cpu")).total
    total.backward()
    return total.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", DENSE)
def test_loss_and_gradients_are_those_of_the_library(family: str) -> None:
    register_attention()
    model = tiny_model(family)
    exact = copy.deepcopy(model).double()
    for one in (model, exact):
        one.set_attn_implementation(DOCUMENTS)
    assert run_on_kernels(model) is None
    assert run_on_kernels(exact) is None and not any(isinstance(one, OnKernels) for one in exact.modules())
    found, gradients = loss_and_gradients(model)
    wanted, right = loss_and_gradients(exact)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert gradients.keys() == right.keys()
    for name, gradient in gradients.items():
        # Float32 through two layers: up to 1e-5 of a gradient's norm.
        assert float((gradient - right[name]).norm() / right[name].norm().clamp_min(1e-6)) < 1e-4, name


SWAPPED = {
    "llama": {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaDecoderLayer"},
    "qwen2": {"Qwen2RMSNorm", "Qwen2MLP", "Qwen2Attention", "Qwen2DecoderLayer"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention", "Qwen3DecoderLayer"},
    "mistral": {"MistralRMSNorm", "MistralMLP", "MistralAttention", "MistralDecoderLayer"},
    "granite": {"GraniteRMSNorm", "GraniteMLP", "GraniteAttention"},
    "gemma": {"GemmaRMSNorm", "GemmaDecoderLayer"},
    "gemma2": {"Gemma2RMSNorm"},
    "qwen3-moe": {"Qwen3MoeRMSNorm", "Qwen3MoeDecoderLayer"},
    "phi3": {"Phi3RMSNorm"},
    "gpt2": set(),
}


@pytest.mark.parametrize("family", SWAPPED)
def test_these_modules_run_on_kernels_and_keep_their_names(family: str) -> None:
    model = tiny_model(family)
    before = {name: one.data_ptr() for name, one in model.state_dict().items()}
    swap(model)
    swapped = {type(one).__name__ for one in model.modules() if isinstance(one, OnKernels)}
    is_faster = panels.is_trusted(torch.float32) or onednn.is_trusted()
    is_multiplying = is_faster and family != "gpt2"  # which has its own kind of linear layer
    assert swapped == SWAPPED[family] | ({"Linear"} if is_multiplying else set())
    assert {name: one.data_ptr() for name, one in model.state_dict().items()} == before
    swap_back(model)
    assert not any(isinstance(one, OnKernels) for one in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3-moe"])
def test_a_layer_adds_and_norms_in_one_pass_unless_something_hangs_on_its_norm(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_attention()
    model = tiny_model(family)
    model.set_attn_implementation(DOCUMENTS)
    swap(model)
    called: list[str] = []
    call = functions._call

    def noted(name: str, *rest: Any) -> None:
        called.append(name)
        call(name, *rest)

    monkeypatch.setattr(functions, "_call", noted)
    one_pass, gradients = learned(model)
    assert called.count("add_norm_forward") == len(model.model.layers)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda module, given, made: seen.append(made))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    called.clear()
    model.zero_grad()
    two_passes, others = learned(model)
    assert "add_norm_forward" not in called and len(seen) == 2 * len(model.model.layers)
    assert torch.equal(one_pass, two_passes)
    for name, gradient in gradients.items():
        # The same sums in float32, one of them in another order.
        assert float((others[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_last_layer_computes_wanted_tokens_alone_and_others_all(family: str) -> None:
    register_attention()
    model = tiny_model(family)
    model.set_attn_implementation(DOCUMENTS)
    swap(model)
    seen: list[tuple[int, ...]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, made: seen.append(tuple(made.shape)))
    pack = to_device(random_pack(), "cpu")
    whole = model.model(**pack.arguments(model.model.forward))[0][0]
    seen.clear()
    assert torch.equal(decoder_states(model, pack), whole[pack.rows])
    assert seen == [(1, 30, 32), (1, len(pack.rows), 32)]
    model.set_attn_implementation("eager")
    one = to_device(random_pack((30,)), "cpu")
    torch.testing.assert_close(
        decoder_states(model, one), model.model(**one.arguments(model.model.forward))[0][0][one.rows]
    )


def test_a_layer_put_into_a_swapped_model_is_used() -> None:
    register_attention()
    model = tiny_model("llama")
    model.set_attn_implementation(DOCUMENTS)
    swap(model)
    before, _ = loss_and_gradients(model)
    for name in ("mlp.gate_proj", "self_attn.q_proj"):
        other = copy.deepcopy(model.get_submodule(f"model.layers.0.{name}"))
        other.weight.data.mul_(2)
        model.set_submodule(f"model.layers.0.{name}", other)
        after, _ = loss_and_gradients(model)
        assert float(after) != pytest.approx(float(before), rel=1e-4)
        before = after


def test_a_copy_of_a_swapped_model_is_the_librarys_own() -> None:
    model = tiny_model("llama").eval()
    ids = torch.arange(10)[None]
    swap(model)
    said = model(ids).logits
    one = copy.deepcopy(model)  # by __reduce__, as pickle does
    assert not any(isinstance(module, OnKernels) for module in one.modules())
    torch.testing.assert_close(one(ids).logits, said, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_is_kept() -> None:
    register_attention()
    for family in ("mistral", "qwen2", "qwen3"):
        options = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 0}
        model = tiny_model(family, sliding_window=4, **options)
        model.set_attn_implementation(DOCUMENTS)
        wanted, _ = loss_and_gradients(copy.deepcopy(model).double())
        wide = tiny_model(family, sliding_window=None)
        wide.set_attn_implementation(DOCUMENTS)
        swap(model)
        found, _ = loss_and_gradients(model)
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)
        assert float(loss_and_gradients(wide)[0]) != pytest.approx(float(wanted), rel=1e-4)


def test_a_model_that_would_say_something_else_is_left_as_it_was() -> None:
    class LlamaRMSNorm(torch.nn.Module):
        """A norm of a known name that computes something else."""

        def __init__(self, weight: torch.nn.Parameter) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = weight, 1e-6

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.weight * hidden_states

    LlamaRMSNorm.__module__ = "transformers.models.llama.modeling_llama"
    model = tiny_model("llama")
    model.model.norm = LlamaRMSNorm(model.model.norm.weight)
    assert "change the logits by" in (run_on_kernels(model) or "")
    assert not any(isinstance(one, OnKernels) for one in model.modules())
