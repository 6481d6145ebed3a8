"""Real conversations on a real pre-trained model: GSM8K on a Llama of 260 K parameters.

Needs TRAINING_HUB_TEST_DATA. The tokenizer has 512 entries and no chat template, so that problems are 300 to 500 tokens
long; the few that do not fit the model's 512 positions are dropped, and counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training_hub import sft

pytestmark = pytest.mark.slow

ROWS = 1500


def flags(test_data: Path, output: Path) -> list[str]:
    return [
        *("--model", str(test_data / "models/stories260K/hf")),
        *("--data", str(test_data / "sft/gsm8k/train.jsonl")),
        *("--output", str(output)),
        "--model.dtype=float32",
        "--data.chat_template=vicuna",
        f"--data.max_rows={ROWS}",
        "--data.validation_fraction=0.1",
        "--data.overlong=drop",
        "--training.max_seq_len=512",
        "--training.global_batch_size=32",
        "--optimizer.lr=1e-3",
        "--checkpoint.interval=5",
        "--monitoring.console=plain",
    ]


def start(test_data: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "training_hub", "sft", *flags(test_data, output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    output = tmp_path_factory.mktemp("gsm8k") / "unbroken"
    process = start(request.getfixturevalue("test_data"), output)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return output


def test_the_validation_loss_falls(unbroken):
    metrics = json.loads((unbroken / "result.json").read_text())["metrics"]
    assert metrics["validation_loss"] < 0.8 * metrics["validation_loss_before"]


def test_killed_and_resumed_it_ends_in_the_same_weights(test_data, unbroken, tmp_path):
    process = start(test_data, tmp_path / "run")
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "checkpoints" / "step-10").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "final").exists()
    resumed = start(test_data, tmp_path / "run")
    said, _ = resumed.communicate(timeout=900)
    assert resumed.returncode == 0, said
    assert "going on after step" in said
    for name, tensor in weights(unbroken).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])


def test_the_same_run_through_the_function_gives_the_same_weights(test_data, unbroken, tmp_path):
    result = sft(
        model_path=str(test_data / "models/stories260K/hf"),
        data_path=str(test_data / "sft/gsm8k/train.jsonl"),
        ckpt_output_dir=str(tmp_path / "run"),
        backend="torch",
        effective_batch_size=32,
        max_seq_len=512,
        learning_rate=1e-3,
        chat_template="vicuna",
        validation_split=0.1,
        overrides={"model.dtype": "float32", "data.max_rows": ROWS, "data.overlong": "drop", "checkpoint.interval": 5},
    )
    assert result.status == "finished"
    for name, tensor in weights(unbroken).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])
