"""Tiny random models of many families, and random packs to run them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from training_hub.types import Pack

VOCABULARY = 128

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that attention matters: with the usual 0.02 a tiny model says the same whatever it attends to.
    "initializer_range": 0.3,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                    "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
                            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "phi3": ("Phi3Config", {}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                                  "attention_multiplier": 0.4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                     "head_dim": 8}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                                 "sliding_window": 6}),
    "deepseek-v3": ("DeepseekV3Config", {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                         "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                                         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
                                         "first_k_dense_replace": 1, "moe_intermediate_size": 24}),
}  # fmt: skip

DENSE = tuple(name for name in FAMILIES if name not in ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"))

LENGTHS = (11, 5, 11, 3)


def tiny_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**{**SHAPE, **settings, **changes})


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random model with the attention that transformers gives it, in training mode."""
    return from_config(tiny_config(family, **changes), dtype)


def from_config(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # Biases and norms start at 0 or 1, where a forgotten one goes unseen.
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        assert parameter.isfinite().all(), name
    return model.to(dtype).train()  # drawn before it is rounded: the same model in each format


def random_pack(lengths: Sequence[int] = LENGTHS, seed: int = 0, trained: float = 0.6) -> Pack:
    """Random documents with random weights, of which a share of `trained` is not 0."""
    random = np.random.default_rng(seed)
    boundaries = np.cumsum([0, *lengths]).astype(np.int32)
    total = int(boundaries[-1])
    weights = (random.random(total) < trained) * random.uniform(0.1, 2.0, total)
    weights[boundaries[:-1]] = 0
    return Pack(
        ids=random.integers(3, VOCABULARY, total).astype(np.int32),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        weights=weights.astype(np.float32),
        boundaries=boundaries,
        samples=np.arange(len(lengths), dtype=np.int64),
    )


def documents_of(pack: Pack) -> list[Pack]:
    """Each document of a pack as a pack of its own."""
    spans = zip(pack.boundaries[:-1], pack.boundaries[1:], strict=True)
    return [
        Pack(
            ids=pack.ids[start:end],
            positions=pack.positions[start:end],
            weights=pack.weights[start:end],
            boundaries=np.array([0, end - start], dtype=np.int32),
            samples=pack.samples[index : index + 1],
        )
        for index, (start, end) in enumerate(spans)
    ]
