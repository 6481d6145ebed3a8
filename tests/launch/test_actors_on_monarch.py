"""The same actors on Monarch, where it is installed. In a process of its own, since Monarch leaves threads behind."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.run import recipe, train
from training_hub import run_actor
from training_hub.errors import LaunchError
from training_hub.recipe import Recipe
from training_hub.recipe.load import dump

HAS_MONARCH = find_spec("monarch") is not None
ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio, json, sys
from tests.launch.plain_actor import Killed, Plain
from training_hub import HubError, run_actor

try:
    done = asyncio.run(run_actor({"Plain": Plain, "Killed": Killed}[sys.argv[1]], sys.argv[2], launcher="monarch"))
    said = {"restarts": done.restarts, "train": done.values["train"], "evaluation": done.evaluation}
except HubError as error:
    said = {"error": type(error).__name__, "problems": error.problems}
print("SAID", json.dumps(said, default=str))
"""


def on_monarch(actor: str, asked: Recipe, tmp_path: Path) -> Any:
    """What became of the actors of a mesh."""
    file = tmp_path / "asked.yaml"
    file.write_text(dump(asked))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-c", PROGRAM, actor, str(file)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    line = next((line for line in ended.stdout.splitlines() if line.startswith("SAID ")), None)
    assert line is not None, ended.stdout + ended.stderr
    return json.loads(line.removeprefix("SAID "))


def plain(output: Path, seed: int) -> Recipe:
    sections = {"model": {"path": "m"}, "data": {"path": "d"}, "monitoring": {"console": "off"}}
    return Recipe.model_validate({**sections, "output": str(output), "seed": seed, "processes": {"procs": 2}})


@pytest.mark.skipif(HAS_MONARCH, reason="Monarch is installed")
def test_without_monarch_it_is_said_what_to_install(tmp_path: Path):
    with pytest.raises(LaunchError, match=r"pip install 'training-hub\[monarch\]', or write launcher='processes'"):
        asyncio.run(run_actor(config=plain(tmp_path, 0), launcher="monarch"))


needs_monarch = pytest.mark.skipif(not HAS_MONARCH, reason="Monarch is not installed: pip install torchmonarch")


@needs_monarch
def test_where_one_is_killed_all_begin_anew_and_an_error_keeps_its_type(tmp_path: Path):
    said = on_monarch("Plain", plain(tmp_path / "killed", 1), tmp_path)
    assert said == {"restarts": 2, "train": [{"begun": 3}, {"begun": 3}], "evaluation": {"rank": 0}}
    said = on_monarch("Plain", plain(tmp_path / "failed", 2), tmp_path)
    assert said == {"error": "DataError", "problems": ["row 3: no. (rank 1 of 2)"]}


@needs_monarch
@pytest.mark.slow
def test_two_trainers_go_on_from_their_last_checkpoint(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    settings: dict[str, Any] = {
        "training": {"global_batch_size": 4, "steps": 24, "preflight": False},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "checkpoint": {"interval": 2},
        "comm": {"timeout_seconds": 20},
    }
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", **settings)
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", **settings, processes={"procs": 2})
    said = on_monarch("Killed", asked, tmp_path)
    assert said["restarts"] == 1 and said["train"][0]["status"] == "finished"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    for row, other in zip(rows, alone.history, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), "float32 sums in another order, over 24 steps"
