"""Callbacks of transformers beside SFTTrainer: what they hear, what they may ask for, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from training_hub import RecipeError, SFTConfig, SFTTrainer, TrainingError
from training_hub.types import StepReport

QUICK = {"training.preflight": False, "monitoring.console": "off", "data.cache": False}
PAIRS = [{"instruction": f"Add 1 to {n}.", "response": f"{n + 1}."} for n in range(8)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Notes(TrainerCallback):
    """What transformers' callbacks are told, in order."""

    def __init__(self, end_after: int | None = None) -> None:
        self.heard: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.end_after = end_after

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heard.append((f"begin of {state.max_steps} at {args.learning_rate}", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.heard.append(("step", state.global_step))
        if state.global_step == self.end_after:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)
        self.heard.append(("log", state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.heard.append((f"evaluate {sorted(metrics)[1]}", state.global_step))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heard.append(("epoch", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heard.append(("end", state.global_step))


def trl(**fields: Any) -> SFTConfig:
    return SFTConfig(**{"output_dir": "out", "per_device_train_batch_size": 4, "logging_steps": 2, "overrides": QUICK,
                        "num_train_epochs": 2, **fields})  # fmt: skip


def test_callbacks_of_transformers_hear_what_happens(tiny_model_folder: Path):
    notes, reports = Notes(), []
    SFTTrainer(
        model=str(tiny_model_folder), args=trl(eval_strategy="epoch"), train_dataset=PAIRS, eval_dataset=PAIRS[:2],
        callbacks=[notes, reports.append],
    ).train()  # fmt: skip
    assert notes.heard == [
        ("begin of 4 at 2e-05", 1), ("step", 1),
        ("step", 2), ("log", 2), ("evaluate eval_loss", 2), ("epoch", 2),
        ("step", 3),
        ("step", 4), ("log", 4), ("evaluate eval_loss", 4), ("epoch", 4), ("end", 4),
    ]  # fmt: skip
    assert [type(report) for report in reports] == [StepReport] * 4
    assert notes.logs[0]["loss"] == reports[1].loss


def test_a_callback_may_end_the_run_which_keeps_its_model(tiny_model_folder: Path):
    trainer = SFTTrainer(model=str(tiny_model_folder), args=trl(), train_dataset=PAIRS, callbacks=[Notes(end_after=2)])
    result = trainer.train().result
    assert (result.status, len(result.history)) == ("stopped", 2)
    assert result.reason == "callback Notes ended it at step 2"
    assert (result.model_path / "model.safetensors").is_file()
    assert trainer.state.global_step == 2


def test_the_early_stopping_of_transformers_stops(tiny_model_folder: Path):
    args = trl(eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
               learning_rate=1e-12, num_train_epochs=5)  # fmt: skip
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1.0)
    trainer = SFTTrainer(
        model=str(tiny_model_folder), args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:2], callbacks=[stopping]
    )
    result = trainer.train().result
    assert result.status == "stopped"
    assert len(result.history) < 10


class Saves(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...


class Wishes(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = True
        return control


def test_callbacks_that_wait_in_vain_are_refused(tiny_model_folder: Path):
    make = {"model": str(tiny_model_folder), "args": trl(), "train_dataset": PAIRS}
    with pytest.raises(RecipeError, match="callbacks: Saves waits for on_save, which no run here tells of; heard are"):
        SFTTrainer(**make, callbacks=[Saves()])
    with pytest.raises(RecipeError, match="callbacks: found 3; allowed: callbacks of transformers, or functions"):
        SFTTrainer(**make, callbacks=[3])
    with pytest.raises(TrainingError, match=r"callback Wishes set control.should_save at step 1.* Write save_steps"):
        SFTTrainer(**make, callbacks=[Wishes]).train()
