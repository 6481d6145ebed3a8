"""Checkpoints that are written while training goes on: the same bits, and as safe as those that it waits for."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariants.run import final_weights, recipe, train
from tests.moments import PATIENCE_SECONDS, until
from training_hub.errors import DiskError, Interrupted, TrainingError
from training_hub.folders import damage, manifest
from training_hub.launch import run
from training_hub.monitoring.jsonl import read_metrics
from training_hub.recipe.load import dump

MODES = ("async", "async_with_pinned_mem")
STEPS = {"steps": 8, "preflight": False}


class Gate:
    """Holds up the thread that writes, where it flushes a file to the disk, until it is opened.

    A profile function sees each call of a C function without taking the place of any. Where `holds` names a folder,
    what is flushed before that folder is there goes through.
    """

    def __init__(self, *, holds: Path | None = None, opens_after: float | None = None):
        self.holds, self.opens_after = holds, opens_after
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called is os.fsync and (self.holds is None or self.holds.exists()):
            self.reached.set()
            assert self.opened.wait(self.opens_after or PATIENCE_SECONDS) or self.opens_after

    @contextmanager
    def standing(self) -> Iterator[None]:
        threading.setprofile(self)  # of threads that are started from here on
        try:
            yield
        finally:
            self.opened.set()
            threading.setprofile(None)


def saving(mode: str, interval: int, keep_last: int | None = None, **more: Any) -> dict[str, Any]:
    return {"interval": interval, "keep_last": keep_last, "minutes": None, "async_mode": mode, **more}


def tensors_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a checkpoint says of the files of tensors."""
    return {name: facts for name, facts in manifest(folder)["files"].items() if name.endswith("safetensors")}


def whole_steps(output: Path) -> list[int]:
    """The steps there are, all of them whole, with nothing half written beside them."""
    folders = sorted((output / "checkpoints").iterdir(), key=lambda path: path.name)
    assert not [line for folder in folders for line in damage(folder)]
    return [int(folder.name.removeprefix("step-")) for folder in folders]


@pytest.fixture(scope="module")
def unbroken(tiny_model_folder, chat_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    return train(tiny_model_folder, chat_file, output, training=STEPS, checkpoint=saving("disabled", 1))


def same_bits(result: Any, other: Any) -> bool:
    first, second = final_weights(result), final_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", MODES)
def test_each_step_is_saved_with_the_bits_that_it_had_however_late(
    mode, tiny_model_folder, chat_file, tmp_path, unbroken
):
    """Each flush takes 20 ms longer here, so that steps overtake the writing; each save waits for the one before."""
    with Gate(opens_after=0.02).standing():
        found = train(tiny_model_folder, chat_file, tmp_path, training=STEPS, checkpoint=saving(mode, 1))
    assert whole_steps(found.output_dir) == whole_steps(unbroken.output_dir) == list(range(1, 9))
    for mine, other in zip(found.checkpoints, unbroken.checkpoints, strict=True):
        assert tensors_of(mine) == tensors_of(other)
    assert same_bits(found, unbroken)


def test_training_goes_on_while_a_checkpoint_is_written(tiny_model_folder, chat_file, tmp_path):
    gate, seen = Gate(), []

    def look(report: Any) -> None:
        if report.step == 7:
            assert gate.reached.wait(PATIENCE_SECONDS)
            seen.extend(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
            gate.opened.set()

    with gate.standing():
        train(tiny_model_folder, chat_file, tmp_path, [look], training=STEPS, checkpoint=saving("async", 4))
    assert seen == [".tmp-step-4"], "three steps later it has no name yet"
    assert whole_steps(tmp_path) == [4, 8]


def test_a_signal_waits_for_what_is_being_written_and_saves_the_step_it_came_in(
    tiny_model_folder, chat_file, tmp_path, unbroken
):
    def signal_at_5(report: Any) -> None:
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"training": STEPS, "checkpoint": saving("async", 4)}
    with Gate(opens_after=0.2).standing(), pytest.raises(Interrupted, match="stopped after step 5"):
        train(tiny_model_folder, chat_file, tmp_path, [signal_at_5], **settings)
    assert whole_steps(tmp_path) == [4, 5]
    assert same_bits(train(tiny_model_folder, chat_file, tmp_path, **settings), unbroken)


def test_an_error_waits_for_what_is_being_written(tiny_model_folder, chat_file, tmp_path):
    def fail_at_5(report: Any) -> None:
        if report.step == 5:
            raise KeyError("the plug was pulled")

    with Gate(opens_after=0.2).standing(), pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path, [fail_at_5], training=STEPS, checkpoint=saving("async", 4))
    assert whole_steps(tmp_path) == [4]


def test_a_disk_that_refuses_ends_the_run_in_words_and_leaves_the_last_whole_checkpoint(
    tiny_model_folder, chat_file, tmp_path, unbroken
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_at_4(report: Any) -> None:
        if report.step == 4:
            until((tmp_path / "checkpoints" / "step-2").exists)
            # No file may grow beyond this, as if the disk were full.
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        if report.step == 5:
            time.sleep(1)  # longer than the disk takes to refuse

    settings = {"training": STEPS, "checkpoint": saving("async", 2, keep_last=1)}
    try:
        with pytest.raises(DiskError, match="checkpoint step-4 could not be written"):
            train(tiny_model_folder, chat_file, tmp_path, [fill_at_4], **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1]
    assert last <= 6, "it ends where it is seen, at the latest where the next one is saved"
    assert whole_steps(tmp_path) == [2]
    assert same_bits(train(tiny_model_folder, chat_file, tmp_path, **settings), unbroken)


HELD_UP = """
import sys, threading, yaml
from pathlib import Path
from tests.invariants.test_background_saving import Gate
from training_hub.launch import run
from training_hub.recipe import Recipe

recipe = Recipe.model_validate(yaml.safe_load(open(sys.argv[1])))
threading.setprofile(Gate(holds=Path(recipe.output) / "checkpoints" / ".tmp-step-6"))
run(recipe)
"""


def test_kill_9_while_a_checkpoint_is_held_up_goes_on_from_the_one_before(
    tiny_model_folder, chat_file, tmp_path, unbroken
):
    output = tmp_path / "run"
    asked = recipe(tiny_model_folder, chat_file, output, training=STEPS, checkpoint=saving("async", 3, keep_last=1))
    (tmp_path / "asked.yaml").write_text(dump(asked))
    process = subprocess.Popen([sys.executable, "-c", HELD_UP, str(tmp_path / "asked.yaml")])
    metrics = output / "metrics.jsonl"
    until(lambda: metrics.exists() and len(read_metrics(metrics)) >= 7)
    process.kill()
    process.wait()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [".tmp-step-6", "step-3"]
    resumed = run(asked)
    assert same_bits(resumed, unbroken)
    assert [row["step"] for row in resumed.history] == list(range(1, 9))
    assert whole_steps(output) == [6]


@pytest.mark.parametrize("algorithm", ["sft", "lora_sft"])
def test_the_plan_counts_the_copies_of_a_checkpoint(algorithm, tiny_model_folder, chat_file, tmp_path):
    settings = {"algorithm": algorithm, "training": {"steps": 1, "preflight": False}}
    found = train(tiny_model_folder, chat_file, tmp_path, **settings, checkpoint=saving("async", 1, final=False))
    memory = found.plan["memory_gib"]
    numbers = sum(facts["bytes"] for facts in tensors_of(found.checkpoints[0]).values())
    # A file has a header of names and shapes beside its numbers, and the optimizer a step for each weight.
    assert memory["staged"] * 2**30 == pytest.approx(numbers, abs=16_000)
    without = train(tiny_model_folder, chat_file, tmp_path / "without", **settings, checkpoint={"final": False}).plan
    assert memory["total"] - without["memory_gib"]["total"] == pytest.approx(memory["staged"])
