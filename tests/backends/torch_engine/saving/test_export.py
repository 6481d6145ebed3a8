"""The final folder is an ordinary Hugging Face folder that holds exactly what was trained."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.adaptations.full import Full
from training_hub.backends.torch_engine.saving import export as export_module
from training_hub.backends.torch_engine.saving.base_weights import Written
from training_hub.backends.torch_engine.saving.export import WholeModel, export, is_rounding
from training_hub.errors import TrainingError


def model(is_tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=is_tied,
        eos_token_id=7,
    )
    return LlamaForCausalLM(config).to(dtype)


def write(made, folder, tokenizer_folder, dtype=torch.float32, weights=None, stop_ids=(), template="{{ messages }}"):
    adaptation = Full()
    adaptation.attach(made)
    chosen = weights or dict(made.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return export(made, adaptation.export(chosen, Written(dtype)), dtype, folder, tokenizer, template, stop_ids)


@pytest.mark.parametrize("is_tied", [False, True])
def test_it_loads_strictly_with_transformers_and_gives_the_same_logits(tiny_model_folder, tmp_path, is_tied):
    made = model(is_tied)
    assert write(made, tmp_path / "final", tiny_model_folder) == 0.0
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 5, 9, 200]])
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert loaded.config.tie_word_embeddings is is_tied


@pytest.mark.parametrize(("family", "wanted"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_it_is_asked_with_an_attention_that_leaves_nothing_out(family, wanted, tmp_path):
    """By itself transformers 5.17 loads a Gemma 2 with an attention that does not cap its scores."""
    tiny_model(family).save_pretrained(tmp_path)
    loaded, _, problems = WholeModel().load(None, torch.float32, tmp_path)
    assert (loaded.config._attn_implementation, problems) == (wanted, [])


def test_a_model_larger_than_a_file_may_be_is_parted_as_transformers_does_it(tiny_model_folder, tmp_path):
    made = model()
    tensors = Full()
    tensors.attach(made)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    state = tensors.export(dict(made.named_parameters()), Written(torch.float32))
    files = WholeModel(max_shard_size="60KB")
    export(made, state, torch.float32, tmp_path / "final", tokenizer, None, (), files=files)
    shards = sorted((tmp_path / "final").glob("model-*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{n}-of-0000{len(shards)}.safetensors" for n in (1, 2, 3)]
    assert all(path.stat().st_size < 60_000 + 4096 for path in shards), "numbers, and a header of names"
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_float32_masters_of_a_bfloat16_model_are_written_in_full(tiny_model_folder, tmp_path):
    made = model(dtype=torch.bfloat16)
    masters = {name: p.detach().float() * (1 + 2**-10) for name, p in made.named_parameters()}
    write(made, tmp_path / "final", tiny_model_folder, torch.float32, masters)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "float32"
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, masters[name])


def test_it_stops_where_training_stopped_and_carries_the_template_used(tiny_model_folder, tmp_path):
    write(model(), tmp_path / "final", tiny_model_folder, stop_ids=[2, 7])
    generation = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, 2]
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == "{{ messages }}"


def test_a_folder_that_does_not_hold_the_model_never_gets_the_name(tiny_model_folder, tmp_path):
    made = model()
    tensors = dict(made.state_dict())
    wrong = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
    with export_module.write_whole(tmp_path / "other") as aside:
        made.save_pretrained(aside)
        with pytest.raises(TrainingError, match=r"model\.norm\.weight is not what was written"):
            export_module.verify(aside, made, wrong, torch.float32)


def test_a_folder_that_does_not_hold_what_is_in_memory_never_gets_it_either(tiny_model_folder, tmp_path):
    """Formats of 16 bits tell numbers apart by half a unit in the last place, 2^-8 of them in bfloat16; no more is
    forgiven."""
    made = model(dtype=torch.bfloat16)
    exact = {name: one.float() for name, one in made.named_parameters()}
    rounded = {name: one * (1 + 2**-9) for name, one in exact.items()}
    write(made, tmp_path / "final", tiny_model_folder, weights=rounded)
    other = {**rounded, "model.layers.1.mlp.up_proj.weight": exact["model.layers.1.mlp.up_proj.weight"] * (1 + 2**-7)}
    with pytest.raises(TrainingError, match=r"1\.mlp\.up_proj\.weight is not the rounding of what was trained"):
        write(made, tmp_path / "wrong", tiny_model_folder, weights=other)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("computed", "saved"), [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_wide_formats_are_equal_to_the_last_bit(computed, saved):
    one = torch.tensor([1.0, 1e-40], dtype=computed)
    assert is_rounding(one, one.to(saved))
    assert not is_rounding(one, torch.nextafter(one, torch.tensor(2.0, dtype=computed)).to(saved))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_makes_of_any_number_is_told_from_another(saved):
    exact = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).exp2_().mul_(1e-2)
    held, written = exact.bfloat16(), exact.to(saved)
    assert is_rounding(held, written)
    assert not is_rounding(held, written * (1 + 2**-6))
