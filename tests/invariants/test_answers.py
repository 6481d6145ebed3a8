"""Evaluation by generation in a run: the weights are those of a run without it, and what was said is all there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariants.run import final_weights, recipe, train
from training_hub.backends import Given
from training_hub.errors import DataError, Interrupted
from training_hub.launch import run
from training_hub.types import StepReport, TrainResult

VALIDATED = {"validation_fraction": 0.25}
STEPS = {"steps": 6, "preflight": False}
ASKED = {"interval": 2, "generate": 8, "metrics": ["exact_match", "f1", "bleu"]}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(tiny_model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("asked") / "run"
    return train(tiny_model_folder, chat_file, output, data=VALIDATED, training=STEPS, evaluation=ASKED)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0}])
def test_a_run_with_generation_has_the_weights_of_one_without(
    drawn: dict[str, float], tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    shared = {
        "data": VALIDATED,
        "training": {**STEPS, "activation_checkpointing": "full"},
    }
    without = train(tiny_model_folder, chat_file, tmp_path / "without", **shared, evaluation={"interval": 2})
    asked = {"interval": 2, "generate": True, **drawn}
    answered = train(tiny_model_folder, chat_file, tmp_path / "with", **shared, evaluation=asked)
    first, second = final_weights(without), final_weights(answered)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["loss"] for row in without.history] == [row["loss"] for row in answered.history]


def test_dropout_draws_the_same_with_and_without(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    shared = {"data": VALIDATED, "training": STEPS}
    without = train(folder, chat_file, tmp_path / "without", **shared, evaluation={"interval": 1})
    asked = {"interval": 1, "generate": 4, "temperature": 0.8}
    answered = train(folder, chat_file, tmp_path / "with", **shared, evaluation=asked)
    assert [row["loss"] for row in without.history] == [row["loss"] for row in answered.history]


def test_predictions_hold_prompt_reference_both_answers_and_scores(asked: TrainResult):
    rows = lines(asked.output_dir / "predictions.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert "<|im_start|>user\nWhat comes after" in row["prompt"] and row["prompt"].endswith("assistant\n")
        assert row["reference"].rstrip(".").replace(", I think", "").isdigit()
        for side in ("base", "tuned"):
            assert row[side]["finish_reason"] in ("stop", "length") and isinstance(row[side]["answer"], str)
            assert list(row[side]["scores"]) == ["exact_match", "f1", "bleu"]
        assert row["step"] == 6 and row["row"].endswith(tuple("0123456789"))
    assert [path.name for path in sorted((asked.output_dir / "predictions").iterdir())] == [
        f"step-{step}.jsonl" for step in (0, 2, 4, 6)
    ]


def test_scores_are_in_metrics_and_result_with_those_before_training(asked: TrainResult):
    measured = [row for row in asked.history if "validation_exact_match" in row]
    assert [row["step"] for row in measured] == [2, 4, 6]
    for name in ("exact_match", "f1", "bleu", "unfinished", "answer_tokens"):
        assert asked.metrics[f"validation_{name}"] == measured[-1][f"validation_{name}"]
        assert f"validation_{name}_before" in asked.metrics
    rows = lines(asked.output_dir / "predictions.jsonl")
    unfinished = sum(row["tuned"]["finish_reason"] == "length" for row in rows) / len(rows)
    assert asked.metrics["validation_unfinished"] == unfinished
    assert asked.metrics["validation_f1"] == pytest.approx(sum(row["tuned"]["scores"]["f1"] for row in rows) / 8)


class StopAt:
    """Interrupts the run from outside at a step, as a scheduler's SIGTERM would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, report: StepReport) -> None:
        if report.step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_ends_with_the_same_predictions_and_best_step(
    asked: TrainResult, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    one = recipe(tiny_model_folder, chat_file, tmp_path / "run", data=VALIDATED, training=STEPS, evaluation=ASKED)
    with pytest.raises(Interrupted):
        run(one, Given(watchers=[StopAt(3)]))
    result = run(one)
    assert lines(tmp_path / "run" / "predictions.jsonl") == lines(asked.output_dir / "predictions.jsonl")
    changing = ("tokens_per_second", "trained_tokens_per_second", "memory_gib", "peak_fraction", "peak_tflops")
    first, second = ({k: v for k, v in each.metrics.items() if k not in changing} for each in (asked, result))
    assert first == second


def test_the_best_step_can_be_chosen_by_a_function_of_the_users(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    (tmp_path / "mine.py").write_text("def shortness(answer, reference):\n    return -len(answer)\n")
    asked = {
        "interval": 1,
        "generate": 6,
        "metrics": [f"{tmp_path}/mine.py:shortness"],
        "best_metric": "shortness",
        "best_mode": "min",
    }
    result = train(
        *(tiny_model_folder, chat_file, tmp_path / "run"),
        data=VALIDATED,
        training={**STEPS, "steps": 4},
        optimizer={"lr": 1e-2},
        evaluation=asked,
        checkpoint={"keep_best": True},
    )
    scores = {row["step"]: row["validation_shortness"] for row in result.history}
    best = min(scores, key=scores.__getitem__)
    assert result.metrics["best_step"] == best
    assert result.metrics["best_validation_shortness"] == scores[best]
    assert {row["step"] for row in lines(tmp_path / "run" / "predictions.jsonl")} == {best}


def test_a_run_stops_early_and_is_then_taken_as_it_is(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    settings: dict[str, Any] = {
        "data": VALIDATED,
        "training": {"steps": 12, "preflight": False},
        "optimizer": {"lr": 0.3},  # far too much: the first evaluation stays the best
        "checkpoint": {"keep_best": True},
        "evaluation": {"interval": 1, "early_stopping_patience": 2},
    }
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **settings)
    losses = [row["validation_loss"] for row in result.history]
    assert result.status == "stopped" and "early_stopping_patience" in result.reason
    assert len(losses) < 12 and losses.index(min(losses)) == len(losses) - 3
    assert result.metrics["best_step"] == len(losses) - 2
    assert result.model_path is not None and result.model_path.is_dir()
    again = train(tiny_model_folder, chat_file, tmp_path / "run", **settings)
    assert again.status == "stopped" and again.metrics == result.metrics


def test_answers_that_another_run_left_are_not_taken_for_this_ones(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    left = tmp_path / "run" / "predictions" / "step-0.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("of another run\n")
    asked = {"generate": 4, "at_start": False}
    train(tiny_model_folder, chat_file, tmp_path / "run", data=VALIDATED, training=STEPS, evaluation=asked)
    assert not left.exists()
    assert all("base" not in row for row in lines(tmp_path / "run" / "predictions.jsonl"))


def test_rows_that_ask_nothing_are_refused_before_the_model_is_loaded(tiny_model_folder: Path, tmp_path: Path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The {n} tigers."}) + "\n" for n in range(20)))
    with pytest.raises(DataError, match="nothing in these rows asks for an answer"):
        train(tiny_model_folder, text, tmp_path / "run", data=VALIDATED, training=STEPS, evaluation={"generate": True})
    assert not (tmp_path / "run" / "plan.json").exists()  # which is written once the model is there


def test_a_function_from_python_is_a_metric_of_a_run_and_may_decide_which_step_is_best(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    from training_hub import RecipeError, sft

    def shortness(answer: str, reference: str) -> float:
        return -len(answer)

    settings = {
        "data.validation_fraction": 0.25,
        "data.cache": False,
        "training.preflight": False,
        "monitoring.console": "off",
        "checkpoint.keep_best": True,
        "evaluation.interval": 1,
        "evaluation.best_metric": "shortness",
    }
    run_of = {"model_path": tiny_model_folder, "data_path": chat_file, "ckpt_output_dir": tmp_path / "run"}
    asked = {"generate": 4, "metrics": ["f1", shortness], "overrides": settings}
    result = sft(**run_of, backend="torch", max_steps=3, batch_size=8, learning_rate=1e-2, **asked)
    scores = {row["step"]: row["validation_shortness"] for row in result.history}
    assert result.metrics["best_validation_shortness"] == max(scores.values())
    saved = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "live:shortness" in saved
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(RecipeError, match="Hand it over again"):
        train(
            *(tiny_model_folder, chat_file, tmp_path / "other"),
            data=VALIDATED,
            training=STEPS,
            evaluation={"generate": 4, "metrics": ["live:shortness"]},
        )
