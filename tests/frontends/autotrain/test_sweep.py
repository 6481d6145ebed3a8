"""A sweep tries values, keeps each run, and gives the best; started again it takes what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training_hub import LLMTrainingParams, RecipeError
from training_hub.frontends.autotrain.train import train


@pytest.fixture
def base(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder), "data_path": str(chat_file), "text_column": "messages", "epochs": 1,
        "project_name": str(tmp_path / "swept"), "use_sweep": True, "sweep_n_trials": 3, "warmup_ratio": 0.0,
        "overrides": {"training.preflight": False, "monitoring.console": "off", "data.cache": False},
    }  # fmt: skip


def test_the_best_trial_is_given_and_a_sweep_goes_on(base: dict[str, Any]):
    rates = {"lr": [1e-7, 1e-2, 1e-4]}
    model = train(LLMTrainingParams(**base, sweep_backend="grid", sweep_params=rates))
    told = json.loads((Path(base["project_name"]) / "sweep.json").read_text())
    assert sorted(trial["params"]["lr"] for trial in told["trials"]) == sorted(rates["lr"])
    best = min(told["trials"], key=lambda trial: trial["value"])
    assert best["params"] == {"lr": 1e-2}, "in four steps of 16 samples only the largest rate gets anywhere"
    assert told["best"] == best["folder"] == model.output_dir.name
    again = train(LLMTrainingParams(**base, sweep_backend="grid", sweep_params=json.dumps(rates)))
    assert (again.status, again.output_dir) == ("already finished", model.output_dir)


def test_without_a_space_learning_rates_around_lr_are_tried(base: dict[str, Any]):
    train(LLMTrainingParams(**{**base, "sweep_n_trials": 2, "lr": 1e-3, "sweep_metric": "train_loss"}))
    told = json.loads((Path(base["project_name"]) / "sweep.json").read_text())
    assert all(1e-4 <= trial["params"]["lr"] <= 1e-2 for trial in told["trials"])


def test_a_trial_that_fails_does_not_end_the_sweep(base: dict[str, Any]):
    base |= {"sweep_backend": "grid", "optimizer": "sgd", "max_grad_norm": 0.0, "sweep_n_trials": 2}
    model = train(LLMTrainingParams(**base, sweep_params={"lr": [1e30, 1e-3]}))
    told = json.loads((Path(base["project_name"]) / "sweep.json").read_text())
    failed = next(trial for trial in told["trials"] if trial["value"] is None)
    assert failed["params"] == {"lr": 1e30} and "not finite" in failed["problem"]
    assert model.status == "finished"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sweep_params": "{lr: 1}"}, "not JSON"),
        ({"sweep_params": {"lrr": [1e-5]}}, "Did you mean lr"),
        ({"sweep_params": {"lr": {"type": "uniform", "low": 2, "high": 1}}}, "low 2 is not below high 1"),
        ({"sweep_params": {"lr": 3}}, "a list, or a type of"),
        ({"sweep_params": {"lr": [1e-5, -1.0]}}, "found -1.0"),
        ({"sweep_params": {"project_name": ["a"]}}, "is the same in all trials"),
        ({"sweep_backend": "grid"}, "a grid needs a list of values"),
        ({"sweep_backend": "ray"}, "found 'ray'; allowed: one of optuna, random, grid"),
        ({"sweep_n_trials": 0}, "found 0; allowed: a whole number of at least 1"),
        ({"use_sweep": False}, "sweep_n_trials: 3 would change nothing without use_sweep"),
    ],
)
def test_what_is_wrong_in_any_trial_is_said_before_the_first(values: dict[str, Any], said: str, base: dict[str, Any]):
    with pytest.raises(RecipeError, match=said):
        train(LLMTrainingParams(**{**base, **values}))
    assert not Path(base["project_name"]).exists()
