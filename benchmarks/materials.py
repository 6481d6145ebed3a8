"""What the benchmarks train: models of a stated size with random weights, their tokenizer, and rows as messages.

Made once in a folder and used by every side, so that all train the same weights on the same tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same text, with the marks that TRL needs for assistant-only loss.
MARKED_TEMPLATE = TEMPLATE.replace(
    "{{ message['content'] + '<|im_end|>' }}{% else %}",
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}",
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 176,
        "vocab_size": 1024,
    },
    "28m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 8192,
    },
    "158m": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 2816,
        "vocab_size": 8192,
    },
    "large-vocabulary": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 704,
        "vocab_size": 131072,
    },
}


def make_model(folder: Path, size: str, texts: Iterator[str]) -> Path:
    """A Hugging Face folder with a tied Llama of `size` and a byte-level tokenizer trained on `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "tokenizer.json").exists():
        return folder
    tokenizer = byte_tokenizer(texts, min(SIZES[size]["vocab_size"], 8192))
    config = LlamaConfig(
        **SIZES[size],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer(texts: Iterator[str], vocabulary: int = 300) -> Any:
    """A byte-level tokenizer trained on `texts`, with a chatml template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    wrapped.chat_template = TEMPLATE
    return wrapped


def gsm8k(test_data: Path) -> list[dict[str, Any]]:
    """The 7,473 problems of GSM8K's training set as two messages each."""
    rows = []
    for line in (test_data / "sft/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append(_two_turns(row["question"], row["answer"]))
    return rows


def instructions(test_data: Path) -> list[dict[str, Any]]:
    """1,100 short instructions: rows of some 60 tokens."""
    rows = json.loads((test_data / "sft/instruct/rasbt_instruction_data.json").read_text(encoding="utf-8"))
    return [_two_turns(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]


def made_up(count: int = 4000, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for a machine without the test data: words of lognormal number, as in chats."""
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(3000)]

    def text(median: float) -> str:
        return " ".join(draw.choices(words, k=max(1, min(600, int(draw.lognormvariate(0, 0.7) * median)))))

    return [_two_turns(text(40), text(60)) for _ in range(count)]


def long_chats(count: int = 600, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of six turns and some 700 tokens."""
    draw = random.Random(seed)
    pairs = made_up(count * 6, seed)
    return [{"messages": [m for row in draw.sample(pairs, 6) for m in row["messages"]]} for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for message in row["messages"]:
            yield message["content"]


def _two_turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
