"""A way of splitting that a model or a recipe does not allow is refused before a weight is read, with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.backends.torch_engine.tiny_models import tiny_config, tiny_model
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.adaptations.osft import Osft
from training_hub.backends.torch_engine.engine import TorchEngine
from training_hub.backends.torch_engine.layouts.cut import answer_problems
from training_hub.backends.torch_engine.layouts.fitness import split_problems, way_problems
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Degrees, Parallelism, degrees_of


def blank(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))


@pytest.mark.parametrize(
    "family",
    ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "granite", "qwen3-moe", "deepseek-v3"],
)
def test_what_a_plan_of_transformers_describes_can_be_split(family):
    assert split_problems(blank(family), Degrees(tp=2, cp=2), Parallelism()) == []


@pytest.mark.parametrize(
    ("family", "changes", "degrees", "wanted"),
    [
        ("gpt2", {}, {"tp": 2}, "no plan for GPT2LMHeadModel"),
        ("llama", {}, {"tp": 4}, "4 does not divide 2 key-value heads of LlamaForCausalLM; allowed: 1, 2."),
        (
            "llama",
            {"num_attention_heads": 6, "hidden_size": 48},
            {"tp": 4},
            "divide 6 attention heads, 2 key-value heads",
        ),
        ("llama", {"intermediate_size": 45}, {"tp": 2}, r"divide 45 outputs of model.layers.\*.mlp.gate_proj"),
        ("mixtral", {"num_local_experts": 5}, {"tp": 2}, "divide 5 experts of MixtralForCausalLM; allowed: 1."),
        ("llama", {}, {"ep": 2}, "has no experts that can be dealt out"),
        ("qwen3-moe", {}, {"ep": 3}, "3 does not divide 4 experts of Qwen3MoeForCausalLM; allowed: 1, 2, 4."),
    ],
)
def test_what_it_does_not_describe_or_cannot_be_divided_is_refused(family, changes, degrees, wanted):
    (problem,) = split_problems(blank(family, **changes), Degrees(**degrees), Parallelism())
    assert problem.startswith("parallelism.")
    assert re.search(wanted, problem), problem


STAGES = Parallelism(pipeline_parallel_degree=2)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma2", "gemma3", "phi", "granite", "gpt-oss"])
def test_layers_that_a_plan_of_transformers_names_can_be_dealt_out(family):
    assert split_problems(blank(family), Degrees(pp=2), STAGES) == []


def test_layers_that_no_plan_names_or_with_weights_beside_them_are_not_dealt_out():
    (problem,) = split_problems(blank("gpt2"), Degrees(pp=2), STAGES)
    assert problem.startswith("parallelism.pipeline_parallel_degree: 2, but transformers has no plan for GPT2LMHead")
    model = blank("llama")
    model.model.positions = torch.nn.Embedding(8, 32, device="meta")
    (problem,) = split_problems(model, Degrees(pp=2), STAGES)
    assert "weights beside its layers that no stage would have: model.positions.weight. Write 1." in problem
    (problem,) = split_problems(blank("llama"), Degrees(pp=3), Parallelism(pipeline_parallel_degree=3))
    assert "are 3 stages, but the model has 2 layers. Write at most 2." in problem


def with_a_state() -> Any:
    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_packs_of_a_model_with_a_state_stay_on_one_process():
    (problem,) = split_problems(with_a_state(), Degrees(cp=2), Parallelism())
    assert "layers that hand a state from token to token (linear_attention). Write 1." in problem


def test_a_model_with_a_state_does_not_answer_in_stages():
    assert answer_problems(blank("llama")) == answer_problems(blank("gemma3")) == []
    (problem,) = answer_problems(with_a_state())
    assert "(linear_attention), which it asks for in each stage as it answers. Write 1, or evaluation.gen" in problem


def test_layers_of_which_a_part_is_not_split_see_all_tokens():
    model = blank("llama")
    for layer in model.model.layers:
        layer.self_attn.add_module("gate", torch.nn.Linear(32, 32, device="meta"))
    (problem,) = split_problems(model, Degrees(tp=2), Parallelism())
    assert problem == (
        "parallelism.sequence_parallel: LlamaForCausalLM has weights in model.layers.*.self_attn that are not split "
        "beside some that are. Write false."
    )
    assert split_problems(model, Degrees(tp=2), Parallelism(sequence_parallel=False)) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads that do not divide": ({"parallelism": {"tensor_parallel_degree": 4}}, "key-value heads"),
    "another adapter": (
        {"parallelism": {"tensor_parallel_degree": 4}, "algorithm": "lora_sft", "lora": {"tuner": "ia3"}},
        "an adapter of ia3 cannot be split",
    ),
    "blocks of a scale, of columns": (
        {
            "parallelism": {"tensor_parallel_degree": 2},
            "algorithm": "lora_sft",
            "model": {"quantization": "int4"},
        },
        "2 cuts the 32 inputs of model.layers.*.self_attn.o_proj into parts of 16, and model.quantization: int4 keeps "
        "a scale for each 64 weights of a row. Write 1, or model.quantization: int8, or none.",
    ),
    "weights that are rounded together": (
        {
            "parallelism": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2},
            "qat": {"weight_dtype": "int4", "group_size": 32},
        },
        "32 does not divide the 16 inputs of model.layers.*.self_attn.o_proj that a process has where heads and "
        "widths are split among 2. Write 8, or parallelism.tensor_parallel_degree: 1.",
    ),
    "more stages than layers": ({"parallelism": {"pipeline_parallel_degree": 4}}, "but the model has 2 layers"),
    "products kept for one pass of two": (
        {
            "parallelism": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "InterleavedZeroBubble"},
            "training": {"activation_checkpointing": "selective"},
        },
        "Write full or none, or parallelism.pipeline_parallel_schedule: 1F1B.",
    ),
    "split masters of gradients made later": (
        {
            "parallelism": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
            "optimizer": {"state": "8bit"},
        },
        "or optimizer.state: full",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_is_refused_before_its_processes_are_started(case, tmp_path: Path):
    sections, wanted = REFUSED[case]
    tiny_model("llama").save_pretrained(tmp_path / "model")
    asked = recipe(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", processes={"procs": 4}, **sections)
    assert any(wanted in problem for problem in TorchEngine().objections(asked))


@pytest.mark.parametrize(("kind", "is_refused"), [("LOHA", True), ("LORA", False)])
def test_an_adapter_of_a_folder_is_split_if_it_is_of_a_kind_that_can_be(kind, is_refused, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    tiny_config("llama").save_pretrained(tmp_path)
    lora, parallelism = {"adapter": str(tmp_path)}, {"tensor_parallel_degree": 2}
    asked = recipe(tmp_path, tmp_path / "rows.jsonl", tmp_path / "out", algorithm="lora_sft", lora=lora,
                   parallelism=parallelism)  # fmt: skip
    found = way_problems(asked, degrees_of(asked.parallelism, 2))
    assert bool(found) == is_refused
    assert all("loha cannot be split. Write 1, or go on with an adapter of LoRA." in problem for problem in found)


@pytest.mark.parametrize("is_from_folder", [False, True])
def test_rows_of_a_table_that_is_also_the_head_do_not_train_in_slices(is_from_folder, tmp_path: Path):
    sections: dict[str, Any] = {"algorithm": "lora_sft", "parallelism": {"data_parallel_shard_degree": 2}}
    sections["lora"] = {"trainable_tokens": [5, 7]}
    if is_from_folder:
        (tmp_path / "adapter").mkdir()
        said = {"peft_type": "LORA", "trainable_token_indices": [5, 7]}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
        sections["lora"] = {"adapter": str(tmp_path / "adapter")}
    found = {}
    for family in ("llama", "llama-tied"):
        tiny_config(family).save_pretrained(tmp_path / family)
        asked = recipe(tmp_path / family, tmp_path / "rows.jsonl", tmp_path / "out", **sections)
        found[family] = way_problems(asked, degrees_of(asked.parallelism, 2))
    assert found["llama"] == []
    (problem,) = found["llama-tied"]
    assert problem.startswith("lora.adapter: it has rows" if is_from_folder else "lora.trainable_tokens: the table is")
    assert "Write parallelism.data_parallel_shard_degree: 1" in problem


@pytest.mark.parametrize(
    "others", [("tensor",), ("context",), ("data_shard", "expert"), ("tensor", "context", "data_shard", "expert")]
)
def test_stages_go_together_with_all_other_ways(others, tmp_path: Path):
    names = {"data_shard": "data_parallel_shard_degree"}
    asked = dict.fromkeys((names.get(name, f"{name}_parallel_degree") for name in ("pipeline", *others)), 2)
    tiny_model("qwen3-moe").save_pretrained(tmp_path / "model")
    chosen = recipe(
        tmp_path / "model",
        tmp_path / "rows.jsonl",
        tmp_path / "out",
        parallelism=asked,
        evaluation={"generate": True},
        data={"validation_fraction": 0.5},
    )
    assert way_problems(chosen, degrees_of(chosen.parallelism, 16)) == []


@pytest.mark.parametrize(
    ("tuner", "options"), [("vera", {}), ("vblora", {"vector_length": 16, "num_vectors": 8}), ("randlora", {})]
)
def test_an_adapter_with_numbers_that_all_layers_share_is_not_dealt_out_in_stages(tuner, options, tmp_path: Path):
    sections = {"algorithm": "lora_sft", "lora": {"tuner": tuner, "options": options}}
    folder, rows, output = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    asked = recipe(folder, rows, output, parallelism={"pipeline_parallel_degree": 2}, **sections)
    with pytest.raises(RecipeError, match=f"an adapter of {tuner} has numbers that all layers share"):
        Lora(asked).attach(blank("llama", hidden_size=64))
    Lora(recipe(folder, rows, output, **sections)).attach(blank("llama", hidden_size=64))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_adapters_that_are_one_do_not_lie_in_two_stages(settings, tmp_path: Path):
    sections = {"algorithm": "lora_sft", "lora": settings}
    folder, rows, output = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    asked = recipe(folder, rows, output, parallelism={"pipeline_parallel_degree": 2}, **sections)
    with pytest.raises(
        RecipeError, match="what is beside a table that is also the head, or its copy, would lie in the first"
    ):
        Lora(asked).attach(blank("llama-tied"))
    Lora(asked).attach(blank("llama"))


def test_a_table_in_two_stages_is_not_decomposed(tmp_path: Path):
    sections = {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "targets": ["embed_tokens", "mlp"]}}
    folder, rows, output = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    asked = recipe(folder, rows, output, parallelism={"pipeline_parallel_degree": 2}, **sections)
    with pytest.raises(RecipeError, match=r"osft\.targets: the table that is also the head lies in the first stage"):
        Osft(asked).attach(blank("llama-tied"))
    Osft(asked).attach(blank("llama"))
