"""Every family of models trains, and what comes out loads strictly with transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.torch_engine.tiny_models import FAMILIES, tiny_model
from tests.invariants.run import train
from training_hub.errors import DataError

SHORT = {"global_batch_size": 16, "max_seq_len": 256, "steps": 2}


def folder_of(family: str, tokenizer_folder, folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    made = tiny_model(family, vocab_size=len(tokenizer))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_move_the_weights_and_the_final_folder_loads_strictly(family, tiny_model_folder, chat_file, tmp_path):
    folder = folder_of(family, tiny_model_folder, tmp_path / "model")
    result = train(folder, chat_file, tmp_path / "run", training=SHORT)
    before = AutoModelForCausalLM.from_pretrained(folder)
    after, report = AutoModelForCausalLM.from_pretrained(result.model_path, output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    old = dict(before.named_parameters())
    moved = [name for name, parameter in after.named_parameters() if not torch.equal(parameter, old[name])]
    # An expert that no token was sent to has no gradient; everything else moves.
    still = [name for name in old if name not in moved and "expert" not in name]
    assert not still
    assert result.history[1]["loss"] < result.history[0]["loss"] + 0.5


def test_a_longer_sample_than_a_model_has_positions_is_refused_before_it_is_loaded(
    tiny_model_folder, chat_file, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    folder = tmp_path / "model"
    tiny_model("gpt2", vocab_size=len(tokenizer), n_positions=16, max_position_embeddings=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=r"chat\.jsonl line \d+: \d+ tokens, but the model has 16 positions"):
        train(folder, chat_file, tmp_path / "run", training=SHORT)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model_folder, chat_file, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=len(tokenizer) - 40).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=r"the model has embeddings for \d+ tokens"):
        train(folder, chat_file, tmp_path / "run", training=SHORT)
