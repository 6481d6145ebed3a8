"""The shapes that are kept here are those of the models: transformers counts as many weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training_hub.errors import RecipeError
from training_hub.scaling.models import KEPT, Shape, shape_from, shape_of


def config_of(shape: Shape) -> Any:
    """The config of transformers that has this shape."""
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    common = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "head_dim": shape.head_width,
        "tie_word_embeddings": shape.is_tied,
    }  # fmt: skip
    if shape.experts:
        return Qwen3MoeConfig(
            **common, num_experts=shape.experts, num_experts_per_tok=shape.chosen,
            moe_intermediate_size=shape.expert_inner,
        )  # fmt: skip
    kind = Qwen3Config if shape.head_norms else LlamaConfig
    return kind(**common, intermediate_size=shape.inner)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_405b", "qwen3_0.6b", "qwen3_32b", "qwen3_235b_a22b"])
def test_transformers_counts_as_many_weights(name: str):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(KEPT[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == KEPT[name].parameters


def test_the_names_of_models_say_how_many_weights_they_have():
    for name, billions in (
        ("llama3_70b", 70.6),
        ("qwen3_8b", 8.2),
        ("qwen3_235b_a22b", 235.1),
        ("qwen3_30b_a3b", 30.5),
    ):
        assert KEPT[name].parameters / 1e9 == pytest.approx(billions, abs=0.05)
    # A22B: "22 B activated", with the embedding that is looked up; ours are those that are multiplied with.
    assert KEPT["qwen3_235b_a22b"].active_parameters / 1e9 == pytest.approx(22 - 0.6, abs=0.3)


def test_a_folder_has_the_shape_of_its_config(tmp_path: Path, tiny_model_folder: Path):
    from transformers import AutoModelForCausalLM

    counted = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model_folder).parameters())
    assert shape_of(str(tiny_model_folder)).parameters == counted
    config_of(KEPT["qwen3_30b_a3b"]).save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)).parameters == KEPT["qwen3_30b_a3b"].parameters


def test_what_is_built_otherwise_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="its config has no num_hidden_layers"):
        shape_from({"model_type": "gpt2", "n_layer": 2}, "gpt2")
    with pytest.raises(RecipeError, match="its config has layer_types"):
        shape_from(json.loads(config_of(KEPT["qwen3_8b"]).to_json_string()) | {"layer_types": ["a", "b"]}, "hybrid")
    with pytest.raises(RecipeError, match=r"no model whose shape is kept here: .*Did you mean llama3_70b"):
        shape_of("llama_70b")
