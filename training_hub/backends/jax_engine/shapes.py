"""What a model looks like, from its config alone: numbers and choices that the forward pass is written in terms of.

No JAX here: a run is refused before JAX is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.backends.jax_engine.rope import ROPE_TYPES
from training_hub.backends.shared.model_folder import fetched
from training_hub.errors import RecipeError
from training_hub.recipe.sections import Model

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen3_moe")
"""Families that are one decoder with few differences: rotary positions, RMS norms, gated units."""

FAMILIES = (*DECODERS, "gpt2")

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh")

NOT_DONE = ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "router_jitter_noise")
"""Keys of configs that would change what is computed, and do not here."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes and the choices of its family.

    heads share keys and values with kv_heads. windows: for each layer how many tokens back it sees, 0 for all.
    rope: what the config says of rotary positions, sorted pairs. experts: 0 for none; expert_layers: which layers have
    them. q_norm: queries and keys are normed. norm_plus_one: norms multiply by 1 + weight. embed_scale: embeddings are
    multiplied by it. attention_dropout, residual_dropout, embedding_dropout: shares of numbers that are dropped in
    training.
    """

    family: str
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str
    is_tied: bool
    windows: tuple[int, ...]
    positions: int | None
    rope: tuple[tuple[str, Any], ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    q_norm: bool = False
    norm_plus_one: bool = False
    embed_scale: float = 1.0
    experts: int = 0
    expert_hidden: int = 0
    experts_per_token: int = 0
    norm_top_k: bool = True
    expert_layers: tuple[bool, ...] = ()
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0

    @property
    def is_gpt2(self) -> bool:
        return self.family == "gpt2"

    def has_experts(self, layer: int) -> bool:
        return bool(self.expert_layers) and self.expert_layers[layer]


def folder_of(chosen: Model, *, with_weights: bool = True) -> Path:
    """The folder that the recipe's model lies in; one of the hub is fetched, unless it is in the hub's cache."""
    return fetched(chosen.path, chosen.revision, ["*.json", *(["*.safetensors"] if with_weights else [])])


def read_config(chosen: Model) -> Any:
    """The config of the recipe's model as transformers reads it. Raises RecipeError where there is none."""
    from transformers import AutoConfig

    folder = Path(chosen.path).expanduser()
    try:
        if folder.is_dir():
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoConfig.from_pretrained(chosen.path, revision=chosen.revision)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise RecipeError(f"model.path: {chosen.path} cannot be read: {first} Fetch its config.json again.") from error


def config_problems(config: Any, path: str) -> list[str]:
    """Why a model of this config cannot be trained by this engine, each with its remedy."""
    instead = "or write backend: torch, which trains it."
    if config.model_type not in FAMILIES:
        return [
            f"model.path {path}: model_type {config.model_type!r} is not one that the jax engine has: "
            f"{', '.join(FAMILIES)}. Use such a model, {instead}"
        ]
    found = []
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        found.append(
            f"model.path {path}: rope_type {kind!r} is not one that the jax engine has: {', '.join(ROPE_TYPES)}. "
            f"Use backend: torch, which trains it."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append(f"model.path {path}: rotary positions of a part of each head are not here. Use backend: torch.")
    if _activation(config) not in ACTIVATIONS:
        found.append(
            f"model.path {path}: activation {_activation(config)!r} is not one that the jax engine has: "
            f"{', '.join(ACTIVATIONS)}. Use backend: torch."
        )
    odd = [name for name in NOT_DONE if getattr(config, name, False)]
    return [*found, *(f"model.path {path}: config.{name} is not done here. Use backend: torch." for name in odd)]


def shape_of(config: Any) -> Shape:
    """The shape that a transformers config states; `config_problems` must have found nothing."""
    return _gpt2(config) if config.model_type == "gpt2" else _decoder(config)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", ""))


def _gpt2(config: Any) -> Shape:
    return Shape(
        family="gpt2",
        vocabulary=config.vocab_size,
        width=config.n_embd,
        hidden=config.n_inner or 4 * config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        eps=config.layer_norm_epsilon,
        activation=_activation(config),
        is_tied=config.tie_word_embeddings,
        windows=(0,) * config.n_layer,
        positions=config.n_positions,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
        embedding_dropout=config.embd_pdrop,
    )


def _decoder(config: Any) -> Shape:
    family, layers = config.model_type, config.num_hidden_layers
    has_bias = bool(getattr(config, "attention_bias", False))
    return Shape(
        family=family,
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        hidden=config.intermediate_size,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        eps=config.rms_norm_eps,
        activation=_activation(config),
        is_tied=config.tie_word_embeddings,
        windows=_windows(config),
        positions=config.max_position_embeddings,
        rope=tuple(sorted(config.rope_parameters.items())),
        qkv_bias=has_bias or family == "qwen2",
        out_bias=has_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        q_norm=family in ("qwen3", "qwen3_moe"),
        norm_plus_one=family == "gemma",
        embed_scale=config.hidden_size**0.5 if family == "gemma" else 1.0,
        attention_dropout=getattr(config, "attention_dropout", None) or 0.0,
        **_experts(config),
    )


def _windows(config: Any) -> tuple[int, ...]:
    """How far each layer sees: all of them as far as sliding_window, unless the config says which do."""
    window, layers = getattr(config, "sliding_window", None) or 0, config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _experts(config: Any) -> Mapping[str, Any]:
    layers = config.num_hidden_layers
    if config.model_type == "mixtral":
        return {
            "experts": config.num_local_experts,
            "expert_hidden": config.intermediate_size,
            "experts_per_token": config.num_experts_per_tok,
            "expert_layers": (True,) * layers,
        }
    if config.model_type != "qwen3_moe":
        return {}
    sparse = [layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
              for layer in range(layers)]  # fmt: skip
    return {
        "experts": config.num_experts,
        "expert_hidden": config.moe_intermediate_size,
        "experts_per_token": config.num_experts_per_tok,
        "norm_top_k": config.norm_topk_prob,
        "expert_layers": tuple(each and config.num_experts > 0 for each in sparse),
    }
