"""Processes that tokenise and die, or fail on a row: the run stops at once, says where, and loses or doubles no row."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaigns.case import Case
from tests.campaigns.workshop import Child, Ended, Workshop, goes_on, leftovers, outcome
from tests.conftest import CHATML

ROWS, WORKERS = 4000, 2
REFUSES = "{%- for message in messages %}{%- if 'boom' in message.content %}{{- raise_exception('boom') }}{%- endif %}"


def dead_workers(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """kill -9 on one of two workers or on both, at random times of tokenising; every fifth time a row that fails."""
    wanted = "exit 3 naming the rows, result.json says so, no process left; then the same bits as unbroken"
    data = _rows(shop, "rows")
    settings: dict[str, Any] = {"data": {"path": str(data), "workers": WORKERS}}
    output = shop.place("unbroken")
    child = shop.start(shop.recipe(output, **settings))
    seconds = _tokenising(child)
    ended = child.wait()
    assert ended.code == 0, ended.said
    reference = outcome(output)
    for number in range(count):
        if number % 5 == 4:
            yield _failing_row(shop, number, random, wanted)
            continue
        output = shop.place("worker")
        recipe = shop.recipe(output, **settings)
        after, hit = random.uniform(0, seconds), random.randrange(1, WORKERS + 1)
        child = shop.start(recipe)
        workers = _started(child)
        time.sleep(after)
        for pid in random.sample(workers, min(hit, len(workers))):
            _kill(pid)
        ended = child.wait()
        problem, silent = _answer(output, ended, workers, f"with {data} line "), False
        if not problem:
            problem, silent = goes_on(shop, recipe, reference)
        yield Case(
            "death of data workers", f"{number}: {hit} of {WORKERS} after {after:.3f} s", wanted, problem, silent
        )


def _failing_row(shop: Workshop, number: int, random: Random, wanted: str) -> Case:
    line = random.randrange(1, ROWS + 1)
    data, output = _rows(shop, "boom", guilty=line), shop.place("boom")
    template = data.with_suffix(".jinja")
    template.write_text(REFUSES + CHATML.removeprefix("{%- for message in messages %}"))
    settings = {"path": str(data), "workers": WORKERS, "chat_template": str(template)}
    child = shop.start(shop.recipe(output, data=settings))
    workers = _started(child)
    problem = _answer(output, child.wait(), workers, f"{data} line {line}: ")
    problem = problem or ("" if (output / "result.json").exists() else "no result.json")
    return Case("death of data workers", f"{number}: the template raises at row {line}", wanted, problem)


def _rows(shop: Workshop, name: str, guilty: int = 0) -> Path:
    path = shop.place(name).with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number in range(1, ROWS + 1):
            asked = {"role": "user", "content": "boom" if number == guilty else f"What comes after {number}?"}
            file.write(json.dumps({"messages": [asked, {"role": "assistant", "content": f"{number + 1}."}]}) + "\n")
    return path


def _started(child: Child) -> list[int]:
    """The workers of the run, once all have started; fewer where it is over before that is seen."""
    child.wait_until_ready()
    while len(found := _children(child.pid)) < WORKERS and not child.is_over():
        time.sleep(0.001)
    return found


def _tokenising(child: Child) -> float:
    _started(child)
    began = time.monotonic()
    while _children(child.pid):
        time.sleep(0.001)
    return time.monotonic() - began


def _children(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        state = _state(place)
        if state is not None and state[0] != "Z" and int(state[1]) == parent:
            found.append(int(place.parent.name))
    return found


def _state(stat: Path) -> list[str] | None:
    """State and parent of a process (proc(5)), None where it is gone."""
    try:
        return stat.read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # all was tokenised
        return


def _answer(output: Path, ended: Ended, workers: list[int], words: str) -> str:
    alive = [pid for pid in workers if (state := _state(Path(f"/proc/{pid}/stat"))) is not None and state[0] != "Z"]
    if alive:
        return f"processes {alive} live on"
    if left := leftovers(output):
        return f"left {', '.join(left)}"
    if ended.code == 0:  # they had done their work
        return ""
    said = json.loads((output / "result.json").read_text())
    if (said["status"], said["exit_code"], ended.code) != ("failed", 3, 3):
        return f"result.json says {said}, {ended.brief}"
    return "" if words in ended.said else f"did not say {words!r}: {ended.brief}"
