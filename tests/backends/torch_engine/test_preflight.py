"""What is found out about a model before it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.backends.torch_engine.tiny_models import SHAPE, VOCABULARY, from_config, tiny_model
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.preflight import attention_difference, packed_equals_alone

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"state_size": 8}),
    "jamba": ("JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                              "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 8}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
}  # fmt: skip


def prepared(model: nn.Module) -> nn.Module:
    register_attention()
    model.set_attn_implementation(DOCUMENTS)
    return model


def hybrid(name: str) -> nn.Module:
    config, settings = HYBRIDS[name]
    return prepared(from_config(getattr(transformers, config)(**{**SHAPE, **settings})))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_a_transformer_can_be_packed(family: str, dtype: torch.dtype) -> None:
    model = prepared(tiny_model(family, dtype))
    # Rows of a matrix product do not depend on their neighbours, but a mixture of experts sorts them by expert.
    assert packed_equals_alone(model, CrossEntropy(), VOCABULARY) <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert model.training


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model_whose_state_leaks_between_documents_is_found_out(name: str) -> None:
    model = hybrid(name)
    assert packed_equals_alone(model, CrossEntropy(), VOCABULARY) > 0.03


def test_linear_attention_without_its_kernels_cannot_be_packed() -> None:
    settings = {"num_hidden_layers": 4, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}  # fmt: skip
    model = prepared(from_config(transformers.Qwen3NextConfig(**{**SHAPE, **settings})))
    # transformers 5.17 mixes the documents, 5.23 refuses to.
    assert packed_equals_alone(model, CrossEntropy(), VOCABULARY) > 0.03


def test_attention_that_forgets_the_borders_is_found_out() -> None:
    model = tiny_model("llama")

    class Joined(nn.Module):
        """The same decoder, told of one document only and of positions that do not restart."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model.get_decoder()

        def forward(self, input_ids, use_cache):  # type: ignore[no-untyped-def]
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    model.model = Joined()
    model.get_decoder = lambda: model.model
    model.get_input_embeddings = lambda: model.model.inner.embed_tokens
    assert packed_equals_alone(model, CrossEntropy(), VOCABULARY) > 0.03


def test_attention_is_compared_with_the_plain_one() -> None:
    assert attention_difference(prepared(tiny_model("mistral"))) < 1e-6
    chunked = {**SHAPE, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 32}
    # Llama 4 tells its chunks by a mask alone, which ours does not build.
    assert attention_difference(prepared(from_config(transformers.Llama4TextConfig(**chunked)))) > 0.1


def test_a_model_that_refuses_a_pack_for_any_other_reason_is_not_silenced() -> None:
    def broken(model: nn.Module, pack: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        packed_equals_alone(tiny_model("llama"), broken, VOCABULARY)  # type: ignore[arg-type]
