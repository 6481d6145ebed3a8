"""The shapes of models, from their config files or from the ones that are kept here by name.

The kept ones are facts from the config.json that each maker publishes on the Hugging Face hub (`source`), so that a
plan for a large model needs no download. Numbers only; no weight is ever read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training_hub.errors import RecipeError
from training_hub.recipe.names import nearest


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs, dense or a mixture of experts. width: of a hidden row; inner: of a dense MLP.

    experts: of each layer, of which a token goes through `chosen`, each of width `expert_inner`; 0 for a dense model.
    head_norms: whether queries and keys are normalised head by head. source: where the numbers are from.
    """

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    is_tied: bool = False
    head_norms: bool = False
    experts: int = 0
    chosen: int = 0
    expert_inner: int = 0
    source: str = ""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_width

    @property
    def attention_parameters(self) -> int:
        """Of one layer, with its norms."""
        projections = self.width * (2 * self.query_width + 2 * self.key_width)
        return projections + 2 * self.width + (2 * self.head_width if self.head_norms else 0)

    @property
    def expert_parameters(self) -> int:
        """Of all experts of one layer."""
        return self.experts * 3 * self.width * self.expert_inner

    @property
    def mlp_parameters(self) -> int:
        """Of one layer, but for experts: a dense MLP, or the router of a mixture."""
        return self.width * self.experts if self.experts else 3 * self.width * self.inner

    @property
    def layer_parameters(self) -> int:
        return self.attention_parameters + self.mlp_parameters + self.expert_parameters

    @property
    def table_parameters(self) -> int:
        """Of embeddings and head, which may be one matrix."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.table_parameters + self.width

    @property
    def active_parameters(self) -> int:
        """Those that a token is multiplied with: of a mixture only the chosen experts; the embedding is looked up."""
        idle = self.expert_parameters * (self.experts - self.chosen) // self.experts if self.experts else 0
        lookup = 0 if self.is_tied else self.vocabulary * self.width
        return self.parameters - self.layers * idle - lookup


def _llama3(name: str, layers: int, width: int, inner: int, heads: int, hub: str) -> Shape:
    return Shape(name, layers, width, inner, heads, 8, 128, 128256, source=f"huggingface.co/{hub}")


def _qwen3(name: str, layers: int, width: int, inner: int, heads: int, *, is_tied: bool = False) -> Shape:
    hub = f"huggingface.co/Qwen/Qwen3-{name.removeprefix('qwen3_').upper()}"
    return Shape(name, layers, width, inner, heads, 8, 128, 151936, is_tied, head_norms=True, source=hub)


def _qwen3_moe(name: str, layers: int, width: int, heads: int, expert_inner: int, hub: str) -> Shape:
    return Shape(
        name, layers, width, 0, heads, 4, 128, 151936, head_norms=True,
        experts=128, chosen=8, expert_inner=expert_inner, source=f"huggingface.co/{hub}",
    )  # fmt: skip


_KEPT = (
    _llama3("llama3_8b", 32, 4096, 14336, 32, "meta-llama/Llama-3.1-8B"),
    _llama3("llama3_70b", 80, 8192, 28672, 64, "meta-llama/Llama-3.1-70B"),
    _llama3("llama3_405b", 126, 16384, 53248, 128, "meta-llama/Llama-3.1-405B"),
    _qwen3("qwen3_0.6b", 28, 1024, 3072, 16, is_tied=True),
    _qwen3("qwen3_1.7b", 28, 2048, 6144, 16, is_tied=True),
    _qwen3("qwen3_4b", 36, 2560, 9728, 32, is_tied=True),
    _qwen3("qwen3_8b", 36, 4096, 12288, 32),
    _qwen3("qwen3_14b", 40, 5120, 17408, 40),
    _qwen3("qwen3_32b", 64, 5120, 25600, 64),
    _qwen3_moe("qwen3_30b_a3b", 48, 2048, 32, 768, "Qwen/Qwen3-30B-A3B"),
    _qwen3_moe("qwen3_235b_a22b", 94, 4096, 64, 1536, "Qwen/Qwen3-235B-A22B"),
)
KEPT: Mapping[str, Shape] = MappingProxyType({shape.name: shape for shape in _KEPT})


def shape_of(named: str) -> Shape:
    """The shape of a model folder, or of a model that is kept here by name. Raises RecipeError."""
    if named in KEPT:
        return KEPT[named]
    file = Path(named).expanduser() / "config.json"
    if not file.is_file():
        near = nearest(named, KEPT)
        hint = f" Did you mean {near}?" if near else ""
        raise RecipeError(
            f"model.path: {named} is no folder with a config.json, and no model whose shape is kept here: "
            f"{', '.join(KEPT)}.{hint}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file}: not valid JSON ({error}). Fetch the file again.") from error
    return shape_from(config, named)


def shape_from(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a config.json of a Llama, Qwen2, Qwen3, Mistral or mixture of that kind describes.

    Raises RecipeError for a model that is built otherwise: what would be said of it would be wrong.
    """
    text = config.get("text_config") or config
    wanted = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    absent = [key for key in wanted if key not in text]
    odd = [key for key in ("layer_types", "n_shared_experts", "kv_lora_rank") if _is_odd(key, text.get(key))]
    if absent or odd:
        what = f"its config has no {', '.join(absent)}" if absent else f"its config has {', '.join(odd)}"
        raise RecipeError(
            f"model.path {name}: {what}; the formulas of --world-size are for decoders of one kind of layer, as Llama, "
            "Qwen3 and their mixtures. Leave --world-size out for the plan of a run, which is made from the model."
        )
    heads, experts = text["num_attention_heads"], text.get("num_experts") or text.get("num_local_experts") or 0
    return Shape(
        name=name,
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        inner=text.get("intermediate_size", 0),
        heads=heads,
        key_heads=text.get("num_key_value_heads") or heads,
        head_width=text.get("head_dim") or text["hidden_size"] // heads,
        vocabulary=text["vocab_size"],
        is_tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        head_norms=str(text.get("model_type", "")).startswith("qwen3"),
        experts=experts,
        chosen=text.get("num_experts_per_tok") or 0,
        expert_inner=(text.get("moe_intermediate_size") or text.get("intermediate_size", 0)) if experts else 0,
        source=f"{name}/config.json",
    )


def _is_odd(key: str, value: Any) -> bool:
    if key == "layer_types":
        return isinstance(value, list) and len(set(value)) > 1
    return bool(value)
