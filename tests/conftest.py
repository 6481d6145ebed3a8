"""What every part may use: a tiny model folder in Hugging Face format and a small file of conversations.

Both are built once per session by the real libraries; nothing is downloaded and nothing is mocked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers and datasets are imported anywhere: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

CONVERSATIONS: tuple[dict[str, list[dict[str, str]]], ...] = tuple(
    {
        "messages": [
            *([{"role": "system", "content": "You count."}] if number % 4 == 0 else []),
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": f"{number + 1}."},
            *(
                [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"{number + 2}, I think."}]
                if number % 3 == 0
                else []
            ),
        ]
    }
    for number in range(64)
)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of larger test data named by TRAINING_HUB_TEST_DATA; skips the test where it is not set."""
    folder = os.environ.get("TRAINING_HUB_TEST_DATA")
    if not folder:
        pytest.skip("TRAINING_HUB_TEST_DATA is not set: it names the folder of larger test data")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and width 32 with random float32 weights, its byte-level tokenizer and a chatml template.

    The tokenizer has about 300 entries; eos is <|im_end|>, pad is <|endoftext|>, there is no bos.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.random.set_rng_state(state)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher for the tiny model: a Qwen2 of width 48 with the same tokenizer, sharper, with an embedding that is
    padded beyond the tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 20,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 64 small conversations in the messages format; every third has two turns."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS), encoding="utf-8")
    return path


def _byte_level_tokenizer():  # type: ignore[no-untyped-def]  # the type lives in a package imported here only
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_contents(), trainer)
    return tokenizer


def _contents() -> Iterator[str]:
    for row in CONVERSATIONS:
        for message in row["messages"]:
            yield f"{message['role']}\n{message['content']}\n"
