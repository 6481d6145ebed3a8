"""What the output folder holds decides what a start does; failures are written down and raised."""

from __future__ import annotations

import json

import pytest

from tests.invariants.run import recipe, train
from training_hub.errors import CheckpointError, DataError, RecipeError
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


def test_more_than_one_process_is_refused_before_anything_is_loaded(tmp_path):
    asked = recipe(tmp_path / "nowhere", tmp_path / "nothing", tmp_path / "run", processes={"procs": 4, "nodes": 2})
    with pytest.raises(RecipeError, match=r"4 processes on 2 nodes(.|\n)*processes\.procs: 1"):
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
        training={"steps": 1},
        optimizer={"lr": 1e-9},
    )
    assert again.metrics["validation_loss_before"] == pytest.approx(measured[best], rel=1e-4)
