"""Runs by torchforge's keys: several validation sets, LoRA, and what is said where the hub cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training_hub.errors import DataError
from training_hub.frontends.forge.run import train


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_adapter_is_trained_and_each_of_two_validation_sets_measured(tiny_model_folder: Path, chat_file: Path):
    """The loss of both sets together is that of all their trained tokens, so it lies between the two."""
    lines = chat_file.read_text().splitlines()
    Path("first.jsonl").write_text("\n".join(lines[:7]))
    Path("second.jsonl").write_text("\n".join(lines[7:11]))
    result = train(
        {
            "model": {"hf_assets_path": str(tiny_model_folder)},
            "training": {"dataset": str(chat_file), "steps": 4, "seq_len": 128, "local_batch_size": 4},
            "eval": {"eval_every_n_steps": 2, "datasets": [{"path": "first.jsonl"}, {"path": "second.jsonl"}]},
            "checkpoint": {"enable": True, "last_save_in_hf": True},
            "algorithm": "lora_sft",
            "lora": {"r": 4},
        }
    )
    assert result.model_path is not None
    assert (result.model_path / "adapter_config.json").is_file()
    rows = [json.loads(line) for line in Path("checkpoint/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row.get("validation_loss") is not None and row["step"] > 0]
    assert [row["step"] for row in measured] == [2, 4]
    for row in measured:
        of_sets = sorted(value for name, value in row.items() if "first.jsonl" in name or "second.jsonl" in name)
        assert len(of_sets) == 2
        assert of_sets[0] < row["validation_loss"] < of_sets[1]


def test_without_a_network_c4_says_what_to_write(tiny_model_folder: Path):
    config = {"model": {"hf_assets_path": str(tiny_model_folder)}, "training": {"dataset": "c4", "steps": 2}}
    with pytest.raises(DataError, match=r"Without a network write training\.dataset: c4_test"):
        train(config)
