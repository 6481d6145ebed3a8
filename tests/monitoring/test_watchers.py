from __future__ import annotations

import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from training_hub.errors import Interrupted, TrainingError
from training_hub.monitoring.console import LineConsole, SilentConsole
from training_hub.monitoring.jsonl import read_metrics
from training_hub.monitoring.watchers import Callback, asked_to_stop, objections, open_watchers


class Remembering:
    """A user's watcher that remembers the steps it saw and how the run ended."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.status: str | None = None

    def __call__(self, report) -> None:
        self.steps.append(report.step)

    def close(self, status: str) -> None:
        self.status = status


class Unclosable(Remembering):
    def close(self, status: str) -> None:
        super().close(status)
        raise OSError("disk full")


def divide_by_zero(report) -> None:
    raise ZeroDivisionError("by zero")


def test_metrics_console_and_the_users_own_hear_of_each_step(tmp_path, recipe, report):
    stream, own = io.StringIO(), Remembering()
    with open_watchers(recipe(), tmp_path, LineConsole(stream), callbacks=[own]) as watchers:
        for step in (1, 2):
            for watch in watchers:
                watch(report(step=step, total_steps=2))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == own.steps == [1, 2]
    assert "step 2/2" in stream.getvalue()
    assert own.status == "finished"


def test_a_resumed_run_goes_on_in_its_metrics(tmp_path, recipe, report):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with open_watchers(recipe(), tmp_path, SilentConsole(), resume_step) as watchers:
            for step in steps:
                for watch in watchers:
                    watch(report(step=step))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_callback_that_raises_stops_the_run_with_its_name_step_and_error(report):
    with pytest.raises(TrainingError, match="callback divide_by_zero raised ZeroDivisionError at step 1: by zero") as e:
        Callback(divide_by_zero)(report())
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_a_callback_may_stop_the_run_with_an_error_of_ours(report):
    def stop(report) -> None:
        raise Interrupted("enough", signal_number=2)

    with pytest.raises(Interrupted, match="enough"):
        Callback(stop)(report())


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted("stop", 15), "interrupted"), (KeyboardInterrupt(), "interrupted"), (MemoryError(), "failed")],
)
def test_all_are_closed_with_how_the_run_ended_and_its_error_passes(tmp_path, recipe, error, status):
    first, second = Remembering(), Remembering()
    with (
        pytest.raises(type(error)),
        open_watchers(recipe(), tmp_path, SilentConsole(), callbacks=[first, second]),
    ):
        raise error
    assert first.status == second.status == status


def test_an_error_in_closing_is_said_and_the_others_are_still_closed(tmp_path, recipe):
    stream, broken, after = io.StringIO(), Unclosable(), Remembering()
    with (
        pytest.warns(RuntimeWarning, match="Unclosable could not be closed .OSError: disk full."),
        open_watchers(recipe(), tmp_path, LineConsole(stream), callbacks=[broken, after]),
    ):
        pass
    assert "Unclosable could not be closed (OSError: disk full)" in stream.getvalue()
    assert after.status == "finished"


def test_an_error_in_closing_does_not_hide_the_error_of_the_run(tmp_path, recipe):
    with (
        pytest.warns(RuntimeWarning, match="disk full"),
        pytest.raises(KeyError, match="the run"),
        open_watchers(recipe(), tmp_path, SilentConsole(), callbacks=[Unclosable()]),
    ):
        raise KeyError("the run")


def test_trackers_that_are_not_installed_are_all_named_with_what_to_write(recipe, tmp_path):
    # A Python whose only packages are those that a recipe needs, as links: truly without trackers.
    for name in ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml", "numpy", "rich"):
        (tmp_path / name).symlink_to(Path(importlib.import_module(name).__file__).parent)
    (tmp_path / "typing_extensions.py").symlink_to(importlib.import_module("typing_extensions").__file__)
    code = (
        "import sys; sys.path += sys.argv[1:]\n"
        "from training_hub.recipe import Recipe\n"
        "from training_hub.monitoring.watchers import objections\n"
        "asked = {'tensorboard': True, 'wandb': True, 'mlflow': True}\n"
        "made = Recipe.model_validate({'output': 'out', 'model': {'path': 'm'}, 'monitoring': asked})\n"
        "print(*objections(made), sep='\\n')"
    )
    root = Path(__file__).parents[2]
    said = subprocess.check_output([sys.executable, "-S", "-c", code, str(tmp_path), str(root)], cwd=root, text=True)
    assert said.splitlines() == [
        f"{name} is not installed: pip install 'training-hub[{name}]', or set monitoring.{name} to false."
        for name in ("tensorboard", "wandb", "mlflow")
    ]


def test_a_callback_may_ask_for_the_end_of_a_run(recipe, tmp_path, report):
    class Enough:
        stop_reason = ""

        def __call__(self, one):
            self.stop_reason = "enough" if one.step == 2 else ""

    with open_watchers(recipe(), tmp_path, SilentConsole(), callbacks=[lambda one: None, Enough()]) as watchers:
        for step, reason in ((1, ""), (2, "enough")):
            for watch in watchers:
                watch(report(step=step))
            assert asked_to_stop(watchers) == reason


def test_trackers_nobody_asked_for_are_neither_missed_nor_imported(recipe):
    assert objections(recipe()) == []
    code = (
        "import sys, training_hub.monitoring.watchers\n"
        "print({'torch', 'tensorboard', 'wandb', 'mlflow', 'rich'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "set()"
