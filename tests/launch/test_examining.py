"""Saved models are asked by processes that are started for it; by an engine that takes no time."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers import workers
from training_hub.backends import Given
from training_hub.errors import DataError, Interrupted, LaunchError, RecipeError
from training_hub.experiments.comparison import EvaluationResult, compare
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as on Unix")

# What each rank does is written in model.path.
ENGINE = """
import os, sys, time
from pathlib import Path

from training_hub.errors import DataError
from training_hub.evaluation.predictions import Prediction, Sitting


class Alone:
    name = "alone"

    def objections(self, recipe):
        return []

    def num_devices(self):
        return 2

    def train(self, recipe, given):
        raise NotImplementedError

    def examine(self, recipe, given, console, own=()):
        return Sitting((), {"rows": 1.0, "loss": float("inf")})


class Asking(Alone):
    name = "asking"

    def examine_together(self, recipes, given, console, own=()):
        rank = int(os.environ["RANK"])
        print(f"rank {rank} is here", flush=True)
        for one in recipes:
            exec(one.model.path, {**globals(), **locals()})
        said = Prediction("a.jsonl line 1", "?", "!", f"by {rank}", "stop", 1)
        return [Sitting((said,), {"rows": 1.0, "perplexity": float("inf")}) for _ in recipes]
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EvaluationResult]]:
    folder = tmp_path / "site"
    information = folder / "hub_asking-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hub_asking.py").write_text(ENGINE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hub-asking\nVersion: 1.0\n")
    points = "[training_hub.backends]\nasking = hub_asking:Asking\nalone = hub_asking:Alone\n"
    (information / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parents[2])]))

    def ask(
        *scripts: str, output: Path | None = None, backend: str = "asking", given: Any = None, **sections: Any
    ) -> Any:
        base = {"model": {"path": scripts[0]}, "output": "(none)", "backend": backend, "processes": {"procs": 2}}
        recipe = Recipe.model_validate({**base, "data": {"path": "a.jsonl"}, **sections})
        return compare(recipe, scripts, given or Given(), open_console("off"), output)

    yield ask
    sys.modules.pop("hub_asking", None)


def test_all_are_asked_of_all_models_and_the_first_is_heard(asked, tmp_path, capsys):
    found = asked("pass", "time.sleep(0)", output=tmp_path / "eval", evaluation={"generate": True})
    assert found.scores == {name: {"rows": 1.0, "perplexity": float("inf")} for name in ("pass", "time.sleep(0)")}
    assert [row["pass"]["answer"] for row in found.predictions] == ["by 0"]
    assert "rank 0 is here" in (said := capsys.readouterr().out) and "rank 1" not in said
    assert "rank 1 is here" in (tmp_path / "eval" / "logs" / "rank1.log").read_text()
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"evaluation.json", "logs", "predictions.jsonl"}


def test_the_error_of_a_process_is_that_of_the_call(asked, tmp_path):
    script = "if rank == 1: raise DataError(['row 3: no.'])"
    with pytest.raises(DataError) as caught:
        asked(script, output=tmp_path / "eval")
    assert str(caught.value) == f"row 3: no. (rank 1 of 2; its log: {tmp_path / 'eval' / 'logs' / 'rank1.log'})"
    assert not (tmp_path / "eval" / "evaluation.json").exists() and not workers()


def test_the_log_of_a_process_that_is_killed_is_kept_where_no_folder_was_named(asked):
    with pytest.raises(LaunchError) as caught:
        asked("if rank == 0: os.kill(os.getpid(), 9)")
    first, remedy = caught.value.problems
    assert "rank 0 of 2" in first and "was killed by SIGKILL" in first
    assert "rank 0 is here" in Path(first.split("its log: ")[1]).read_text()
    assert remedy == "Nothing was written. Run the same command again."


def test_a_signal_ends_all_of_them(asked):
    def stop() -> None:
        while set(workers()) != {0, 1}:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises((Interrupted, LaunchError)):  # one that has not begun to listen is ended by it
        asked("time.sleep(60)")
    assert not workers()


def test_what_cannot_travel_or_be_divided_is_refused(asked):
    with pytest.raises(RecipeError, match="rows: a live object stays in this process"):
        asked("pass", given=Given(rows=[{"text": "a"}]))
    with pytest.raises(RecipeError, match=r"2 processes, but backend alone lets saved models answer in one\. Write"):
        asked("pass", backend="alone")
    assert asked("pass", backend="alone", processes={"procs": 1}).scores == {
        "pass": {"rows": 1.0, "loss": float("inf")}
    }
