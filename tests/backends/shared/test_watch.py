"""The forgetting watch: what is measured, and that a run which forgets too much is stopped at its last good step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.invariants.run import final_weights, recipe, train
from training_hub.types import TrainResult

FORGETS = {"training": {"steps": 24}, "optimizer": {"lr": 3e-2}, "lr_scheduler": {"name": "constant"}}


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text that has nothing to do with the conversations that are trained."""
    path = tmp_path_factory.mktemp("general") / "general.jsonl"
    rows = [{"text": f"zebra {number * 7919 % 1000:b} QUARTZ vex"} for number in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loss_on_watched_rows_and_its_rise_are_metrics_of_the_steps_that_are_due(
    tiny_model_folder: Path, chat_file: Path, general: Path, tmp_path: Path
):
    watched = {"watch": str(general), "watch_interval": 2}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", training={"steps": 5}, evaluation=watched)
    seen = {row["step"]: row for row in result.history if "watch_loss" in row}
    assert list(seen) == [2, 4, 5], "every second step, and the last one"
    before = result.metrics["watch_loss_before"]
    for row in seen.values():
        assert row["watch_drift"] == pytest.approx(row["watch_loss"] - before, abs=1e-12)
    assert result.metrics["watch_loss"] == seen[5]["watch_loss"]
    assert result.status == "finished" and result.reason == ""


def test_watching_changes_nothing_of_what_is_learned(
    tiny_model_folder: Path, chat_file: Path, general: Path, tmp_path: Path
):
    plain = train(tiny_model_folder, chat_file, tmp_path / "plain", training={"steps": 4})
    settings = {"watch": str(general), "watch_interval": 1, "watch_limit": 50.0}
    watched = train(tiny_model_folder, chat_file, tmp_path / "watched", training={"steps": 4}, evaluation=settings)
    other = final_weights(watched)
    assert all(tensor.equal(other[name]) for name, tensor in final_weights(plain).items())


def test_a_run_that_forgets_too_much_is_stopped_and_gives_the_last_step_within_the_limit(
    tiny_model_folder: Path, chat_file: Path, general: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    free = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "free",
        **FORGETS,
        evaluation={"watch": str(general), "watch_interval": 1},
        checkpoint={"interval": 1, "keep_last": None},
    )
    drifts = [row["watch_drift"] for row in free.history]
    within = next(step for step in range(2, 24) if drifts[step] > max(*drifts[:step], 0.0))
    limit = (max(*drifts[:within], 0.0) + drifts[within]) / 2
    stopped = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "stopped",
        **FORGETS,
        evaluation={"watch": str(general), "watch_interval": 1, "watch_limit": limit},
        checkpoint={"keep_last": 1},
        monitoring={"console": "plain"},
    )
    assert stopped.status == "stopped"
    assert [row["step"] for row in stopped.history] == list(range(1, within + 2))
    assert f"after step {within + 1} " in stopped.reason and f"that of step {within}," in stopped.reason
    assert f"stopped: {stopped.reason[:60]}" in capsys.readouterr().out
    there = load_file(tmp_path / "free" / "checkpoints" / f"step-{within}" / "model.safetensors")
    assert all(tensor.equal(there[name]) for name, tensor in final_weights(stopped).items())
    said = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert (said["status"], said["reason"]) == ("stopped", stopped.reason)


def test_a_stopped_run_is_over_until_it_is_allowed_more(
    tiny_model_folder: Path, chat_file: Path, general: Path, tmp_path: Path
):
    def again(limit: float) -> TrainResult:
        watched = {"watch": str(general), "watch_interval": 24, "watch_limit": limit}
        saving = {"interval": 12, "minutes": None}
        output = tmp_path / "run"
        return train(tiny_model_folder, chat_file, output, **FORGETS, evaluation=watched, checkpoint=saving)

    first = again(1e-6)
    assert first.status == "stopped" and first.model_path is None and "no final model" in first.reason
    second = again(1e-6)
    assert (second.status, second.reason) == ("stopped", first.reason)
    third = again(1e6)
    assert third.status == "finished" and third.model_path is not None
    assert third.metrics["watch_drift"] == pytest.approx(first.metrics["watch_drift"], abs=1e-9), "went on, not anew"


def test_limits_without_watched_rows_are_refused(tmp_path: Path):
    for name in ("watch_interval", "watch_limit"):
        with pytest.raises(ValueError, match=f"evaluation.{name}: 3.* no rows are watched"):
            recipe(tmp_path, tmp_path, tmp_path, evaluation={name: 3})
