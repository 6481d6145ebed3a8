"""A mesh of actors, each in a process of its own on this node."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from typing import Any

from training_hub.backends import LISTEN_FD
from training_hub.launch.actors.calls import Answer, values_of
from training_hub.launch.endings import log_of
from training_hub.launch.layout import Layout
from training_hub.launch.supervisor import (
    GRACE_SECONDS,
    Crew,
    Worker,
    ended_with,
    environment_of,
    forwarding,
    how,
    meeting_place,
    tell,
)
from training_hub.recipe.folder import RunFolder

HOST = "training_hub.launch.actors.host"


class ProcessMesh:
    """`layout.procs` actors. They end with this object's `stop`, or with this process however that ends."""

    def __init__(self, layout: Layout, actor: str, recipe: str, folder: RunFolder):
        self._layout, self._actor, self._recipe, self._folder = layout, actor, recipe, folder
        self._crew = Crew()
        self._held = ExitStack()

    async def start(self) -> None:
        self._held.enter_context(ended_with(self._crew))
        self._held.enter_context(forwarding(self._crew))
        log_of(self._folder.path, 0).parent.mkdir(parents=True, exist_ok=True)
        self._start()
        await asyncio.to_thread(self._ask, {"actor": self._actor, "recipe": self._recipe})

    async def call(self, name: str) -> list[Any]:
        """What each actor's method gives, by rank. Raises the first actor's error, or Lost for one that is gone."""
        return await asyncio.to_thread(self._ask, {"call": name})

    async def stop(self) -> None:
        """End all processes."""
        self._held.close()
        for one in self._crew.workers:
            for pipe in (one.process.stdin, one.process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what was written last found nobody
                        pipe.close()

    def _start(self) -> None:
        with meeting_place(self._layout) as (port, listener):
            for rank in range(self._layout.procs):
                environment = environment_of(self._layout, rank, port, os.environ)
                if rank == 0 and listener is not None:
                    environment[LISTEN_FD] = str(listener.fileno())
                file = log_of(self._folder.path, rank)
                with file.open("ab") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", HOST],
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE if rank == 0 else log,
                        pass_fds=[listener.fileno()] if rank == 0 and listener is not None else [],
                        start_new_session=True,
                    )
                self._crew.workers.append(Worker(rank, process, file))
                if process.stderr is not None:
                    threading.Thread(target=tell, args=(process.stderr, file), daemon=True).start()

    def _ask(self, order: dict[str, Any]) -> list[Any]:
        line = json.dumps(order).encode() + b"\n"
        with ThreadPoolExecutor(len(self._crew.workers)) as pool:
            asked = [pool.submit(exchange, one, line) for one in self._crew.workers]
            failed_at = None
            while not_done := wait(asked, timeout=0.1).not_done:
                if failed_at is None and any(one.done() and not is_answer(one) for one in asked):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
                    for one, answer in zip(self._crew.workers, asked, strict=True):
                        one.is_stuck = answer in not_done
                    self._crew.send(signal.SIGKILL)
        answers = [one.result() for one in asked]
        gone = [one for one, answer in zip(self._crew.workers, answers, strict=True) if answer is None]
        for one in gone:
            one.process.wait()
        first = sorted(gone, key=lambda one: one.is_stuck)
        return values_of(answers, self._folder.path, [f"rank {one.rank} of {len(answers)} {how(one)}" for one in first])


def exchange(worker: Worker, line: bytes) -> Answer | None:
    """The answer of one actor; None where its process is gone."""
    stdin, stdout = worker.process.stdin, worker.process.stdout
    assert stdin is not None and stdout is not None
    try:
        stdin.write(line)
        stdin.flush()
    except OSError:
        return None
    answer = stdout.readline()
    return json.loads(answer) if answer.endswith(b"\n") else None


def is_answer(asked: Future[Answer | None]) -> bool:
    return "value" in (asked.result() or {})
