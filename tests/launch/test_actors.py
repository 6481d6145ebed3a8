"""Actors in processes of their own: their life, their errors, and a new one where one was killed."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.run import final_weights, recipe, train
from tests.launch.plain_actor import Killed, Plain
from training_hub import TrainerActor, run_actor
from training_hub.errors import DataError, LaunchError, RecipeError
from training_hub.launch.actors.lifecycle import ActorRun
from training_hub.recipe import Recipe

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as on Unix")

SETTINGS: dict[str, Any] = {
    "training": {"global_batch_size": 4, "steps": 24, "preflight": False},
    "optimizer": {"name": "SGD", "lr": 0.1},
    "checkpoint": {"interval": 2},
}


def plain(output: Path, seed: int, **more: Any) -> ActorRun:
    sections = {"model": {"path": "m"}, "data": {"path": "d"}, "monitoring": {"console": "off"}}
    asked = Recipe.model_validate({**sections, "output": str(output), "seed": seed, "processes": {"procs": 2}})
    return asyncio.run(run_actor(Plain, asked, **more))


def test_each_call_reaches_all_actors_in_order(tmp_path: Path):
    done = plain(tmp_path / "run", 0)
    assert done.values == {
        "setup": [0, 1],
        "train": [{"begun": 1}, {"begun": 1}],
        "evaluate": [{"rank": 0}, {"rank": 1}],
        "cleanup": ["2", "2"],
    }
    assert (done.evaluation, done.result, done.restarts) == ({"rank": 0}, None, 0)
    assert "rank 1 prints" in (tmp_path / "run" / "logs" / "rank1.log").read_text()


def test_where_one_is_killed_all_begin_anew(tmp_path: Path):
    done = plain(tmp_path / "run", 1)
    assert done.restarts == 2 and done.values["train"] == [{"begun": 3}, {"begun": 3}]


def test_an_error_of_an_actors_own_is_the_error_of_the_call(tmp_path: Path):
    with pytest.raises(DataError, match=r"row 3: no\. \(rank 1 of 2; its log: .*rank1\.log\)"):
        plain(tmp_path / "run", 2)
    assert (tmp_path / "run" / "setups0").read_text() == "x", "and is no reason to try again"


def test_after_the_last_try_it_is_said_what_was_lost(tmp_path: Path):
    with pytest.raises(LaunchError) as caught:
        plain(tmp_path / "run", 3, max_restarts=1)
    assert "rank 0 of 2" in caught.value.problems[0] and "was killed by SIGKILL" in caught.value.problems[0]
    assert caught.value.problems[-1] == "Processes were lost 2 times; that is all."


def test_what_cannot_be_started_is_refused_in_words(tmp_path: Path):
    class Local(Plain):
        pass

    asked = {"model.path": "m", "data.path": "d", "output": str(tmp_path)}
    for arguments, said in (
        ((Local, asked), "where other processes cannot import it"),
        ((Plain, {**asked, "processes.nodes": 2, "processes.rdzv_endpoint": "a:1"}), "on this node alone"),
        ((Plain, {**asked, "sed": 1}), "seed"),
        ((Plain,), "config: not given"),
    ):
        with pytest.raises(RecipeError, match=said):
            asyncio.run(run_actor(*arguments))
    with pytest.raises(RecipeError, match="allowed: processes, monarch"):
        asyncio.run(run_actor(Plain, asked, launcher="ray"))  # type: ignore[arg-type]


def test_a_trainer_that_is_killed_goes_on_from_its_last_checkpoint_to_the_same_bits(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", **SETTINGS)
    settings = {**SETTINGS, "data": {"validation": str(chat_file)}, "monitoring": {"console": "off"}}
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", **settings)
    done = asyncio.run(run_actor(Killed, asked))
    assert done.restarts == 1
    assert done.result is not None and done.result.status == "finished"
    assert str(done.values["setup"][0]["newest_checkpoint"]).startswith("step-"), "it did not begin at the beginning"
    weights, other = final_weights(done.result), final_weights(alone)
    assert all((weights[name] == other[name]).all() for name in other)
    assert [row["step"] for row in done.result.history] == list(range(1, 25))
    assert done.evaluation["rows"] == 64 and done.evaluation["loss"] > 0
    assert done.values["cleanup"] == [{"final": str(tmp_path / "run" / "final")}]


def test_without_other_processes_it_is_an_ordinary_object(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 2}, "data": {"validation_fraction": 0.1}}
    actor = TrainerActor(recipe(tiny_model_folder, chat_file, tmp_path / "run", **settings))
    with pytest.raises(LaunchError, match="Call train first"):
        actor.evaluate()
    assert actor.setup() == {"output": str(tmp_path / "run"), "newest_checkpoint": None}
    assert json.loads(json.dumps(actor.train()))["status"] == "finished"
    assert set(actor.evaluate()) >= {"validation_loss"}
    assert actor.cleanup()["final"] == str(tmp_path / "run" / "final")
    (tmp_path / "run" / "final" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(Exception, match="its model has changed"):
        actor.cleanup()
