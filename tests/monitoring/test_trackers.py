from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training_hub.errors import BackendError
from training_hub.monitoring.console import LineConsole, SilentConsole
from training_hub.monitoring.watchers import open_watchers

CANARY = "canary-5c1f"


def train(recipe, folder, reports, resume_step=0):
    with open_watchers(recipe, folder, SilentConsole(), resume_step) as watchers:
        for one in reports:
            for watch in watchers:
                watch(one)


def holds_canary(folder) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_back_what_was_reported(tmp_path, recipe, report):
    pytest.importorskip("tensorboard")
    reports = [report(step=1, loss=3.5), report(step=2, loss=math.nan), report(step=3, loss=2.5, validation_loss=2.75)]
    train(recipe(tensorboard=True), tmp_path, reports)
    read = events(tmp_path / "tensorboard")
    losses = read.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [losses[0].value, losses[2].value] == [3.5, 2.5] and math.isnan(losses[1].value)
    assert losses[0].wall_time == report().time
    assert [(event.step, event.value) for event in read.Scalars("validation/loss")] == [(3, 2.75)]
    assert read.Scalars("train/learning_rate")[0].value == pytest.approx(1e-5)
    assert b'"global_batch_size": 32' in read.Tensors("recipe")[0].tensor_proto.string_val[0]


def test_tensorboard_goes_where_it_is_told_at_the_steps_it_is_told(tmp_path, recipe, report):
    pytest.importorskip("tensorboard")
    asked = recipe(tensorboard=str(tmp_path / "elsewhere"), log_interval=10)
    train(asked, tmp_path, [report(step=step, total_steps=25) for step in range(1, 26)])
    assert [event.step for event in events(tmp_path / "elsewhere").Scalars("train/loss")] == [1, 10, 20, 25]


def test_tensorboard_shows_a_resumed_run_as_one_line(tmp_path, recipe, report):
    pytest.importorskip("tensorboard")
    train(recipe(tensorboard=True), tmp_path, [report(step=step, loss=1.0) for step in (1, 2, 3, 4)])
    train(recipe(tensorboard=True), tmp_path, [report(step=step, loss=2.0) for step in (3, 4)], resume_step=2)
    losses = [(event.step, event.value) for event in events(tmp_path / "tensorboard").Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_writes_an_offline_run_without_secrets_and_goes_on_in_it(tmp_path, recipe, report, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    asked = recipe(wandb=True, wandb_project="tests")
    train(asked, tmp_path, [report(step=step) for step in (1, 2)])
    first = (tmp_path / "wandb_run_id").read_text()
    train(asked, tmp_path, [report(step=3)], resume_step=2)
    files = [path for path in (tmp_path / "wandb").rglob("*.wandb") if not path.is_symlink()]
    assert len({path.parent for path in files}) in (1, 2)
    assert {path.stem for path in files} == {f"run-{first.strip()}"}
    contents = b"".join(path.read_bytes() for path in files)
    assert b"train/loss" in contents and b"global_batch_size" in contents
    assert holds_canary(tmp_path) == []


def test_wandb_without_a_login_is_an_error_that_says_what_to_do(tmp_path):
    pytest.importorskip("wandb")
    # In a process of its own: wandb keeps the mode of its first run for the whole process.
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from training_hub.monitoring.wandb import WandbRun\n"
        "from training_hub.recipe import Recipe\n"
        "WandbRun(Recipe.model_validate({'output': 'out', 'model': {'path': 'm'}}), Path(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "BackendError: monitoring.wandb: Weights & Biases refused the run" in ran.stderr
    assert "Log in with `wandb login`" in ran.stderr


# Warnings of mlflow and its database library about each other are not ours to mend.
@pytest.mark.filterwarnings("ignore::Warning")
def test_mlflow_keeps_values_settings_and_the_end_of_a_run_that_was_resumed(tmp_path, recipe, report, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    monkeypatch.setenv("HF_TOKEN", CANARY)
    asked = recipe(mlflow=True, mlflow_experiment_name="tests", mlflow_run_name="first")
    with pytest.raises(KeyboardInterrupt):
        train(asked, tmp_path, interrupted_after(report(step=1, loss=3.5)))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = (tmp_path / "mlflow_run_id").read_text().strip()
    assert client.get_run(run_id).info.status == "KILLED"
    train(asked, tmp_path, [report(step=2, loss=2.5, validation_loss=2.75)], resume_step=1)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["training.global_batch_size"] == "32"
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")] == [
        (1, 3.5),
        (2, 2.5),
    ]
    assert run.data.metrics["validation/loss"] == 2.75
    assert holds_canary(tmp_path) == []


def interrupted_after(one):
    yield one
    raise KeyboardInterrupt


def test_mlflow_at_an_address_it_cannot_use_is_an_error_before_the_first_step(tmp_path, recipe):
    pytest.importorskip("mlflow")
    asked = recipe(mlflow=True, mlflow_tracking_uri="nonsense://host")
    with (
        pytest.raises(BackendError, match=r"monitoring\.mlflow_tracking_uri"),
        open_watchers(asked, tmp_path, LineConsole(io.StringIO())),
    ):
        pass
