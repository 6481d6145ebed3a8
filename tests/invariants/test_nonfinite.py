"""A loss or gradient that is not finite stops the run within one step, names the rows, and is never saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.invariants.run import final_weights, train
from training_hub.errors import TrainingError
from training_hub.monitoring.jsonl import read_metrics


@pytest.fixture
def poisoned_model(tiny_model_folder, tmp_path):
    """A copy of the tiny model in which the embedding of '!' is NaN, so that only rows with a '!' are affected."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder)("!", add_special_tokens=False)["input_ids"]
    assert len(token) == 1
    weights["model.embed_tokens.weight"][token[0]] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows(path, guilty: tuple[int, ...], count: int = 24, heavy: float = 1.0):
    """Rows of which the guilty ones hold a '!', and weigh `heavy`."""
    lines = [
        {
            "weight": heavy if number in guilty else 1.0,
            "messages": [
                {"role": "user", "content": f"Say {number}" + ("!" if number in guilty else ".")},
                {"role": "assistant", "content": str(number)},
            ],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SETTINGS = {
    "data": {"shuffle": False},
    "checkpoint": {"interval": 1, "minutes": None},
    "training": {"global_batch_size": 8},
    "evaluation": {"at_start": False},
}


def test_the_run_stops_in_that_step_and_names_the_guilty_rows(poisoned_model, tmp_path):
    data = rows(tmp_path / "rows.jsonl", guilty=(9, 13))
    with pytest.raises(TrainingError) as caught:
        train(poisoned_model, data, tmp_path / "run", **SETTINGS)
    message = str(caught.value)
    assert "step 2: loss nan" in message
    assert "rows.jsonl line 10" in message and "rows.jsonl line 14" in message
    assert "line 11" not in message
    assert "step-1" in message
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-1" / "model.safetensors")
    assert sum(int(tensor.isnan().any()) for tensor in saved.values()) == 1  # the embedding it came with
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_skip_leaves_the_step_out_and_says_so(tiny_model_folder, tmp_path):
    data = rows(tmp_path / "rows.jsonl", guilty=(9,), heavy=1e38)  # times a loss of 5, more than float32 can hold
    settings = {**SETTINGS, "training": {"global_batch_size": 8, "on_nonfinite": "skip"}}
    result = train(tiny_model_folder, data, tmp_path / "run", **settings)
    assert [row["skipped"] for row in result.history] == [False, True, False]
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(result).values())


def test_weights_that_are_not_finite_never_become_a_final_model(poisoned_model, tmp_path):
    with pytest.raises(TrainingError, match=r"model\.embed_tokens\.weight holds 32 numbers that are not finite"):
        train(poisoned_model, rows(tmp_path / "rows.jsonl", guilty=()), tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()


def test_a_learning_rate_that_explodes_is_an_error_and_not_a_model(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(TrainingError, match="not finite"):
        train(
            tiny_model_folder,
            chat_file,
            tmp_path / "run",
            optimizer={"name": "SGD", "lr": 1e30},
            training={"max_norm": 0, "epochs": 5},
        )
    assert not (tmp_path / "run" / "final").exists()
