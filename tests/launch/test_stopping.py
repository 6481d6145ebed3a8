"""Signals at every moment of a run, one or two of them: result.json never goes on saying that it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest

from training_hub.backends import HEARS_TWICE, Given
from training_hub.backends.shared import signals
from training_hub.backends.shared.signals import StopRequest
from training_hub.errors import Interrupted
from training_hub.launch import run
from training_hub.launch.stopping import Stop, stoppable
from training_hub.recipe import Recipe

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as on Unix")
BOTH = (signal.SIGTERM, signal.SIGINT)

# An engine that stops as the torch engine does, and takes no time.
ENGINE = """
from pathlib import Path

from training_hub.backends.shared.signals import StopRequest
from training_hub.errors import Interrupted
from training_hub.types import TrainResult


class Counter:
    name = "counter"

    def objections(self, recipe):
        return []

    def train(self, recipe, given):
        with StopRequest() as stop:
            for step in range(5):
                for watch in given.watchers:
                    watch(step)
                if stop.number is not None:
                    raise Interrupted("stopped after a step. Run the same command again.", stop.number)
        return TrainResult("finished", Path(recipe.output), None, engine=self.name)
"""

SENDER = """
import os, sys, time
pid = int(sys.argv[1])
for line in sys.stdin:
    first, second, delay, gap = line.split()
    start = time.perf_counter()
    print(flush=True)
    for number, moment in ((int(first), float(delay)), (int(second), float(delay) + float(gap))):
        while time.perf_counter() - start < moment:
            pass
        os.kill(pid, number)
    print(flush=True)
"""


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Recipe]]:
    """Recipes for the engine, installed as any engine from elsewhere; signals that come too late do nothing."""
    folder = tmp_path / "site"
    information = folder / "hub_counter-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hub_counter.py").write_text(ENGINE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hub-counter\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[training_hub.backends]\ncounter = hub_counter:Counter\n")
    monkeypatch.syspath_prepend(folder)
    before = {number: signal.signal(number, too_late) for number in BOTH}
    numbers = count()
    sections: dict[str, Any] = {"model": {"path": "none"}, "monitoring": {"console": "off"}, "backend": "counter"}
    yield lambda: Recipe.model_validate({**sections, "output": str(tmp_path / f"run-{next(numbers)}")})
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.modules.pop("hub_counter", None)


def too_late(number: int, frame: FrameType | None) -> None:
    """What stands in for the caller's own handlers."""


def ending(recipe: Recipe, watchers: tuple[Any, ...] = ()) -> str:
    """Run it, and check that what it raised, result.json and the handlers left behind agree; "none": no result.json."""
    raised = None
    try:
        run(recipe, Given(watchers=watchers))
    except Interrupted as error:
        raised = error
    assert [signal.getsignal(number) for number in BOTH] == [too_late, too_late]
    file = Path(recipe.output) / "result.json"
    if not file.exists():
        assert raised is not None and "no checkpoint had been written" in str(raised)
        return "none"
    said = json.loads(file.read_text())
    if raised is None:
        assert said["status"] == "finished"
    else:
        assert (said["status"], said["exit_code"]) == ("interrupted", raised.exit_code)
    return said["status"]


class SignalAtLine:
    """Sends SIGTERM after step 2, and SIGINT when another `left` lines of the run have begun."""

    def __init__(self, left: int):
        self.left, self.is_armed = left, False

    def arm(self, step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
            self.is_armed = True

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "training_hub" not in frame.f_code.co_filename and "hub_counter" not in frame.f_code.co_filename:
            return None
        if event == "line" and self.is_armed:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


def test_a_second_signal_at_any_line_after_the_first_was_heard_leaves_a_result(counter: Callable[[], Recipe]) -> None:
    endings = []
    for line in count(1):
        second, recipe = SignalAtLine(line), counter()
        sys.settrace(second)
        try:
            endings.append(ending(recipe, (second.arm,)))
        finally:
            sys.settrace(None)
        if second.left > 0:  # the run has fewer lines than that
            break
    assert len(endings) > 40 and set(endings) == {"interrupted"}


def test_two_signals_at_any_time_and_any_distance_leave_a_result_or_nothing(
    counter: Callable[[], Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file that was being opened when the interruption came is closed by Python, which mentions it; pytest makes a
    # report of that, in which it could be interrupted in turn.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    random = Random(20261121)
    endings, longest = [], 0.03
    with subprocess.Popen(
        [sys.executable, "-c", SENDER, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdin is not None and sender.stdout is not None
        for _ in range(150):
            pair, delay = random.choices(BOTH, k=2), random.uniform(0, longest)
            gap = 10 ** random.uniform(-6, -2)
            sender.stdin.write(f"{int(pair[0])} {int(pair[1])} {delay} {gap}\n")
            sender.stdin.flush()
            sender.stdout.readline()
            endings.append(ending(counter()))
            sender.stdout.readline()
            # Whatever a run takes here and now, some signals come before its end and some after.
            longest *= 0.9 if endings[-1] == "finished" else 1.1
    assert {"finished", "interrupted"} <= set(endings) <= {"finished", "interrupted", "none"}


def test_an_interruption_that_is_lost_on_its_way_does_not_make_the_run_deaf() -> None:
    stop = Stop()

    class Careless:
        def __del__(self) -> None:
            with suppress(KeyboardInterrupt):  # as Python does with what is raised here
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), stoppable(stop):
        Careless()
        signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGINT


def test_a_run_that_is_begun_while_an_interruption_is_handled_hears_signals() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt), stoppable(Stop()):
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the signal was not heard")


def test_signals_that_come_while_an_interruption_is_on_its_way_out_do_not_break_what_it_passes() -> None:
    passed = []
    with pytest.raises(KeyboardInterrupt), stoppable(Stop()):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            passed.append("cleaned up")
    assert passed == ["cleaned up"]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_that_a_scheduler_and_the_supervisor_send_is_one(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals all processes of a task; the supervisor, one of them, passes it on to the others."""
    monkeypatch.setenv(HEARS_TWICE, "1")
    heard: list[int] = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert (stop.number, heard) == (number, [])
        monkeypatch.setattr(signals, "ECHO_SECONDS", 0.0)
        with StopRequest():
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert heard == [number], "one that comes later acts as it would without us"
        monkeypatch.delenv(HEARS_TWICE)
        with StopRequest():
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert heard == [number] * 2
    finally:
        signal.signal(number, before)
