"""kill -9 and signals: at random times, and at every call of a save that changes the disk."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaigns.case import Case
from tests.campaigns.workshop import STEPS, At, Ended, Workshop, die, goes_on, outcome
from training_hub.monitoring.jsonl import read_metrics

CALLS = frozenset({"open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "serialize_file", "ftruncate"})
FILE_CALLS = frozenset({"write", "flush", "close"})


def kills_at_random(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """kill -9 at a time drawn from the whole run, loading and final model included."""
    wanted = "goes on by itself, at most one save lost, same bits as unbroken"
    reference, whole = _reference(shop)
    for number in range(count):
        output = shop.place("kill")
        recipe = shop.recipe(output)
        after = random.uniform(0, whole.seconds)
        child = shop.start(recipe)
        child.wait_until_ready()
        time.sleep(after)
        child.signal(signal.SIGKILL)
        child.wait()
        problem = _lost(output)
        silent = False
        if not problem:
            problem, silent = goes_on(shop, recipe, reference)
        yield Case("kill -9 at random times", f"{number}: after {after:.3f} s", wanted, problem, silent)


def _reference(shop: Workshop) -> tuple[Any, Ended]:
    output = shop.place("unbroken")
    shop.train(shop.recipe(output))  # the first run of a process is slower: it fills caches
    output = shop.place("unbroken")
    whole = shop.train(shop.recipe(output))
    assert whole.code == 0, whole.said
    return outcome(output), whole


def _lost(output: Path) -> str:
    """Whether a step older than the last one reported is the newest that was saved."""
    metrics = output / "metrics.jsonl"
    if not metrics.exists():
        return ""
    reported = max((row["step"] for row in read_metrics(metrics)), default=0)
    folder = output / "checkpoints"
    saved = max((int(path.name[5:]) for path in folder.glob("step-*")), default=0) if folder.is_dir() else 0
    return "" if saved >= reported - 1 else f"step {reported} was reported and only step {saved} is saved"


class Tripwire:
    """Counts the calls of C functions that change the disk, and kills the process before or after call `deadly`.

    A profile function sees every such call without replacing any: os.rename is os.rename.
    """

    def __init__(self, deadly: int | None = None, tally: Path | None = None):
        self.deadly, self.tally, self.calls = deadly, tally, 0

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return") or not _changes_the_disk(function):
            return
        self.calls += 1
        if self.calls == self.deadly:
            die()
        if self.tally is not None:
            handle = os.open(self.tally, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.write(handle, str(self.calls).encode())
            os.close(handle)

    def arm(self) -> None:
        sys.setprofile(self)

    def disarm(self) -> None:
        sys.setprofile(None)


def _changes_the_disk(function: Any) -> bool:
    name, of = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    if name in FILE_CALLS:
        is_memory = isinstance(of, io.StringIO | io.BytesIO)
        return type(of).__module__ == "_io" and not is_memory and getattr(of, "name", "") != "<stdout>"
    return name in CALLS and not isinstance(of, str | bytes)  # they have a `replace`, too


def kills_at_every_call(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """kill -9 before and after each call of one save (step 5, which also removes step 2), and of the end of the run."""
    wanted = "goes on by itself, at most one save lost, same bits as unbroken"
    reference, _ = _reference(shop)
    for name, first, last in (("save of step 5", 5, 6), ("final model and result", STEPS, None)):
        total = _calls(shop, first, last)
        chosen = range(1, total + 1) if count >= total else sorted(random.sample(range(1, total + 1), count))
        for call in chosen:
            output = shop.place("call")
            recipe = shop.recipe(output)
            wire = Tripwire(deadly=call)
            ended = shop.train(recipe, [At(first, wire.arm), *([At(last, wire.disarm)] if last else [])])
            problem, silent = _lost(output), False
            if ended.code != -signal.SIGKILL and call < total - 2:
                problem = f"was not killed, {ended.brief}"
            if not problem:
                problem, silent = goes_on(shop, recipe, reference)
            yield Case("kill -9 at every call of a save", f"{name}: call {call} of {total}", wanted, problem, silent)


def _calls(shop: Workshop, first: int, last: int | None) -> int:
    tally = shop.place("tally").with_suffix(".txt")
    tally.parent.mkdir(exist_ok=True)
    wire = Tripwire(tally=tally)
    watchers = [At(first, wire.arm), *([At(last, wire.disarm)] if last else [])]
    ended = shop.train(shop.recipe(shop.place("count")), watchers)
    assert ended.code == 0, ended.said
    return int(tally.read_text())


def signals(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """SIGTERM and SIGINT at random times of a run with validation, every third time twice, 1 us to 0.1 s apart."""
    wanted = "exit 128 + signal (0 while the model is finished), result.json says so, same bits after going on"
    settings: dict[str, Any] = {
        "data": {"validation_fraction": 0.2},
        "evaluation": {"interval": 2},
        "checkpoint": {"interval": 4, "keep_last": 3, "minutes": None},
    }
    output = shop.place("unbroken")
    whole = shop.train(shop.recipe(output, **settings))
    assert whole.code == 0, whole.said
    reference = outcome(output)
    for number in range(count):
        output = shop.place("signal")
        recipe = shop.recipe(output, **settings)
        first = random.choice((signal.SIGTERM, signal.SIGINT))
        second = random.choice((signal.SIGTERM, signal.SIGINT)) if number % 3 == 0 else None
        after, gap = random.uniform(0, whole.seconds), 10 ** random.uniform(-6, -1)
        child = shop.start(recipe)
        child.wait_until_ready()
        time.sleep(after)
        child.signal(first)
        if second is not None:
            time.sleep(gap)
            child.signal(second)
        ended = child.wait()
        problem, silent = _answer(output, ended, {first, second} - {None}), False
        if not problem:
            problem, silent = goes_on(shop, recipe, reference)
        name = f"{number}: {first.name}{'' if second is None else ', ' + second.name} after {after:.3f} s"
        yield Case("SIGTERM and SIGINT", name, wanted, problem, silent)


def _answer(output: Path, ended: Ended, sent: set[Any]) -> str:
    if ended.code == 0:
        return ""
    codes = {128 + number for number in sent}
    file = output / "result.json"
    status = json.loads(file.read_text())["status"] if file.exists() else "none"
    if ended.code in codes and status in ("interrupted", "none") and "Run the same command again" in ended.said:
        return ""
    # Before the first line of run() and after its last Python's own handlers stand: nothing has begun, or all is said.
    is_outside = not output.exists() or status == "interrupted"
    if is_outside and (-ended.code in sent or ended.code == 128 + signal.SIGINT):
        return ""
    return f"result.json says {status}, {ended.brief}"
