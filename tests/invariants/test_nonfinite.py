"""A loss or gradient that is not finite stops the run within one step, names the rows, and is never saved."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.invariants.run import final_weights, train
from training_hub.errors import Interrupted, TrainingError
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


def test_the_run_stops_in_that_step_and_names_the_guilty_rows(tiny_model_folder, tmp_path):
    data = rows(tmp_path / "rows.jsonl", guilty=(9, 13), heavy=1e38)  # times a loss of 5: infinite in float32
    with pytest.raises(TrainingError) as caught:
        train(tiny_model_folder, data, tmp_path / "run", **SETTINGS)
    message = str(caught.value)
    assert "step 2: loss inf" in message
    assert "rows.jsonl line 10" in message and "rows.jsonl line 14" in message
    assert "line 11" not in message
    assert "step-1" in message
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-1" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_skip_leaves_the_step_out_and_says_so(tiny_model_folder, tmp_path):
    data = rows(tmp_path / "rows.jsonl", guilty=(9,), heavy=1e38)  # times a loss of 5, more than float32 can hold
    settings = {**SETTINGS, "training": {"global_batch_size": 8, "on_nonfinite": "skip"}}
    result = train(tiny_model_folder, data, tmp_path / "run", **settings)
    assert [row["skipped"] for row in result.history] == [False, True, False]
    assert all(torch.isfinite(tensor).all() for tensor in final_weights(result).values())


def test_a_model_that_comes_with_numbers_that_are_not_finite_is_refused_before_the_first_step(poisoned_model, tmp_path):
    with pytest.raises(TrainingError, match=r"embed_tokens\.weight holds 32 numbers(.|\n)*came with"):
        train(poisoned_model, rows(tmp_path / "rows.jsonl", guilty=()), tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_step_that_moves_the_weights_to_infinity_is_not_saved(tiny_model_folder, chat_file, tmp_path):
    rate = {"optimizer": {"name": "SGD", "lr": 1e37, "momentum": 0.9}, "lr_scheduler": {"name": "constant"}}
    steep = {**SETTINGS, **rate, "training": {"global_batch_size": 8, "max_norm": 0}}
    with pytest.raises(TrainingError, match="not finite"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **steep)
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


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


def endless_skips(path):
    """Rows of which those of the first two steps, and all from the fourth on, are too heavy."""
    return rows(path, guilty=(0, 8, *range(24, 64, 8)), count=64, heavy=1e38)


def test_skips_without_an_end_stop_the_run_with_step_and_rows(tiny_model_folder, tmp_path):
    data = endless_skips(tmp_path / "rows.jsonl")
    training = {"global_batch_size": 8, "on_nonfinite": "skip", "max_skipped": 3}
    with pytest.raises(TrainingError) as caught:
        train(tiny_model_folder, data, tmp_path / "run", **{**SETTINGS, "training": training})
    message = str(caught.value)
    assert "step 6: loss inf" in message and "3 steps in a row" in message
    assert "rows.jsonl line 41" in message and "line 42" not in message
    assert "training.max_skipped: 30" in message and "optimizer.lr: 0.0001" in message
    assert [row["skipped"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_skips_are_counted_over_a_stop(tiny_model_folder, tmp_path):
    """Going on after step 5 must count steps 4 and 5, which an earlier process left out."""
    data = endless_skips(tmp_path / "rows.jsonl")
    training = {"global_batch_size": 8, "on_nonfinite": "skip", "max_skipped": 3}

    def stop(report) -> None:
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(tiny_model_folder, data, tmp_path / "run", [stop], **{**SETTINGS, "training": training})
    with pytest.raises(TrainingError, match=r"step 6: .*3 steps in a row"):
        train(tiny_model_folder, data, tmp_path / "run", **{**SETTINGS, "training": training})
