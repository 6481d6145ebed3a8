"""A run that waits for its batches says so once, with the step and what to write."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.invariants.run import recipe
from training_hub.backends import Given
from training_hub.backends.shared.signals import StopRequest
from training_hub.backends.torch_engine import engine as engines
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.loop import train
from training_hub.backends.torch_engine.waiting import WINDOW
from training_hub.monitoring.console import SilentConsole


class Heard(SilentConsole):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Column(np.ndarray):
    """Token ids that take their time whenever they are read."""

    delay: Callable[[], None]

    def __getitem__(self, key: Any) -> Any:
        self.delay()
        return np.asarray(self)[key]


class Taking:
    """Takes as long as has passed since it took its time before: half of each step is a wait, on any machine."""

    def __init__(self, until: Callable[[float], None]):
        self.until, self.over = until, time.perf_counter()

    def __call__(self) -> None:
        now = time.perf_counter()
        self.until(now + max(0.02, now - self.over))
        self.over = time.perf_counter()


def sleep(end: float) -> None:
    time.sleep(max(0.0, end - time.perf_counter()))


def compute(end: float) -> None:
    while time.perf_counter() < end:
        pass


def said(model: Path, data: Path, output: Path, delay: Callable[[], None] | None) -> list[str]:
    """What a run of 32 steps with such a column says about waiting."""
    made = recipe(model, data, output, training={"global_batch_size": 4, "epochs": 2})
    console, device = Heard(), torch.device("cpu")
    materials = engines.load_materials(made, Given(), console)
    run = engines.assemble(made, load_model(made, device, torch.float32), materials, device, torch.float32, console)
    if delay is not None:
        ids = np.asarray(run.feed.store.columns["ids"]).view(Column)
        ids.delay = delay
        run.feed.store = dataclasses.replace(run.feed.store, columns={**run.feed.store.columns, "ids": ids})
    stop: AbstractContextManager[StopRequest] = StopRequest()
    with stop as request:
        assert len(list(train(run, request))) == run.feed.total_steps == 32
    return [line for line in console.lines if "waiting for batches" in line]


def test_slow_reading_is_said_once_with_the_step_and_the_folder_to_move(tiny_model_folder, chat_file, tmp_path):
    (line,) = said(tiny_model_folder, chat_file, tmp_path / "run", Taking(sleep))
    assert int(line.removeprefix("step ").partition(":")[0]) >= WINDOW
    assert "They are read" in line and "store" in line and "data.cache_dir: " in line


def test_slow_computing_is_told_apart_from_slow_reading(tiny_model_folder, chat_file, tmp_path):
    (line,) = said(tiny_model_folder, chat_file, tmp_path / "run", Taking(compute))
    assert "made by computing" in line and "cores" in line


def test_nothing_is_said_where_batches_are_there_at_once(tiny_model_folder, chat_file, tmp_path):
    assert said(tiny_model_folder, chat_file, tmp_path / "run", None) == []
