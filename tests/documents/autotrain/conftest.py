"""A model and a folder as AutoTrain's guide has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.documents.autotrain.page import CHAT, TEXTS


@pytest.fixture(scope="session")
def gpt2(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 with its tokenizer, without a chat template, as GPT-2 has none."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the files that the guide speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, rows in {
        "data/train.jsonl": [{"text": text} for text in TEXTS],
        "chat_data/train.jsonl": CHAT,
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "instructions.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "conversations.json").write_text(json.dumps(CHAT))
    return tmp_path
