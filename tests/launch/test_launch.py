"""What the output folder holds decides what a start does; failures are written down and raised."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from tests.invariants.run import recipe, train
from training_hub.backends import Given
from training_hub.errors import CheckpointError, DataError, DiskError, Interrupted, RecipeError, TrainingError
from training_hub.launch import run


def test_a_run_leaves_everything_a_reader_needs(tiny_model_folder, chat_file, tmp_path):
    result = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        data={"validation_fraction": 0.2},
        checkpoint={"at_epoch": True},
    )
    assert {"recipe.yaml", "plan.json", "metrics.jsonl", "result.json", "report.html", "checkpoints", "final"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert result.status == "finished"
    assert result.engine == "torch"
    assert result.model_path == tmp_path / "run" / "final"
    assert len(result.history) == result.plan["total_steps"] == result.metrics["steps"]
    assert result.metrics["validation_loss"] < result.metrics["validation_loss_before"]
    assert result.versions["torch"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"


def test_nodes_that_do_not_know_where_to_meet_are_refused_before_anything_is_loaded(tmp_path, tiny_model_folder):
    asked = recipe(tiny_model_folder, tmp_path / "nothing", tmp_path / "run", processes={"procs": 4, "nodes": 2})
    with pytest.raises(RecipeError, match=r"2 nodes must know where to meet. Write processes\.rdzv_endpoint"):
        run(asked)
    assert not (tmp_path / "run").exists()


def test_a_wrong_setting_before_the_first_checkpoint_does_not_bind_the_folder(tiny_model_folder, chat_file, tmp_path):
    bad = recipe(tiny_model_folder, tmp_path / "missing.jsonl", tmp_path / "run")
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        run(bad)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["error"] == "DataError"
    assert train(tiny_model_folder, chat_file, tmp_path / "run").status == "finished"


def test_a_folder_with_a_model_of_unknown_origin_is_left_alone(tiny_model_folder, chat_file, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml"):
        train(tiny_model_folder, chat_file, tmp_path / "run")


def test_an_output_that_cannot_be_a_folder_is_an_error_that_names_it(tiny_model_folder, chat_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="file cannot be written"):
        train(tiny_model_folder, chat_file, tmp_path / "file")


def test_the_best_of_several_validations_becomes_the_final_model(tiny_model_folder, chat_file, tmp_path):
    result = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        data={"validation_fraction": 0.3},
        training={"epochs": 6, "global_batch_size": 4},
        optimizer={"lr": 0.05},
        evaluation={"interval": 2},
        checkpoint={"keep_best": True, "keep_last": 1},
        lr_scheduler={"name": "constant"},
    )
    measured = {row["step"]: row["validation_loss"] for row in result.history if row.get("validation_loss")}
    best = min(measured, key=measured.__getitem__)
    assert result.metrics["best_step"] == best
    assert (tmp_path / "run" / "checkpoints" / f"step-{best}").is_dir()
    again = train(
        result.model_path,
        chat_file,
        tmp_path / "again",
        data={"validation_fraction": 0.3},
        training={"epochs": 0.01},
        optimizer={"lr": 1e-9},
    )
    assert again.metrics["validation_loss_before"] == pytest.approx(measured[best], rel=1e-4)


def result_of(output):
    return json.loads((output / "result.json").read_text())


def test_result_json_of_an_earlier_failure_does_not_outlive_the_next_start(tiny_model_folder, chat_file, tmp_path):
    seen = []

    def look(report) -> None:
        seen.append(result_of(tmp_path / "run"))
        if report.step == 2:
            raise KeyError("stop")

    for _ in range(2):
        with pytest.raises(TrainingError):
            train(tiny_model_folder, chat_file, tmp_path / "run", [look])
    assert [one["status"] for one in seen] == ["running"] * 4
    assert seen[0]["process"] == os.getpid()
    assert result_of(tmp_path / "run")["status"] == "failed"
    assert result_of(tmp_path / "run")["exit_code"] == TrainingError.exit_code


def test_a_second_signal_stops_at_once_and_says_what_is_saved(tiny_model_folder, chat_file, tmp_path):
    def terminate_twice(report) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"SIGINT received: stopped at once; the newest .* step-2") as caught:
        train(tiny_model_folder, chat_file, tmp_path / "run", [terminate_twice], checkpoint={"interval": 2})
    assert caught.value.exit_code == 130
    assert result_of(tmp_path / "run")["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_rows_are_prepared_is_an_interruption_too(tiny_model_folder, tmp_path):
    def rows():
        yield {"text": "one"}
        os.kill(os.getpid(), signal.SIGTERM)
        yield {"text": "two"}

    asked = recipe(tiny_model_folder, tmp_path / "unused", tmp_path / "run", data={"path": None})
    with pytest.raises(Interrupted, match="SIGTERM received: stopped at once; no checkpoint had been written"):
        run(asked, Given(rows=rows()))
    assert result_of(tmp_path / "run")["exit_code"] == 143


def test_a_final_model_that_changed_is_not_handed_out_as_the_finished_one(tiny_model_folder, chat_file, tmp_path):
    train(tiny_model_folder, chat_file, tmp_path / "run")
    weights = tmp_path / "run" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"its model has changed(.|\n)*model\.safetensors has(.|\n)*Remove"):
        train(tiny_model_folder, chat_file, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    assert train(tiny_model_folder, chat_file, tmp_path / "run").status == "finished"
    assert weights.exists()


def test_restart_does_not_move_the_folder_of_a_run_at_work(tiny_model_folder, chat_file, tmp_path):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", checkpoint={"resume": "restart"})

    def start_again(report) -> None:
        run(asked)

    with pytest.raises(RecipeError, match="is in use by another run"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [start_again])
    assert not (tmp_path / "run.before-1").exists()


def test_a_run_whose_folder_is_removed_fails_and_does_not_claim_to_have_saved(tiny_model_folder, chat_file, tmp_path):
    def remove(report) -> None:
        if report.step == report.total_steps:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(DiskError, match="is gone"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [remove])
    assert not (tmp_path / "run").exists()


def test_a_result_that_cannot_be_read_is_named(tiny_model_folder, chat_file, tmp_path):
    train(tiny_model_folder, chat_file, tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read(.|\n)*Delete it"):
        train(tiny_model_folder, chat_file, tmp_path / "run")


def test_signals_that_keep_coming_do_not_break_the_way_out(tiny_model_folder, chat_file, tmp_path):
    def terminate_often(report) -> None:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)

    class Slow:
        def __call__(self, report) -> None:
            terminate_often(report)

        def close(self, status: str) -> None:
            terminate_often(None)

    with pytest.raises(Interrupted, match="SIGTERM received: stopped at once"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [Slow()])
    assert result_of(tmp_path / "run")["status"] == "interrupted"
