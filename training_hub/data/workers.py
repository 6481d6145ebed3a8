"""Work on chunks in several processes, results in order, with a bounded number of chunks under way.

Workers are forked, so that tokenizer and template reach them without being pickled, and hold no state between chunks.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from training_hub.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

CHUNKS_PER_WORKER = 2


def can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods()


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[Task, Result]):
    """`with Workers(work, 4) as workers: for result in workers.map(tasks)`: results in the order of the tasks.

    Task k goes to worker k modulo n and its result is read from there, so order costs nothing. An exception that
    `work` raises is raised in the caller; a worker that dies is a DataError that says what it had before it, as
    `name` puts the task.
    """

    def __init__(self, work: Callable[[Task], Result], count: int, name: Callable[[Task], str] = str):
        context = multiprocessing.get_context("fork")
        self._count = count
        self._name = name
        # A queue sends from a thread of its own: a parent that sent directly could wait for a worker that waits for it.
        self._tasks: list[Any] = [context.Queue() for _ in range(count)]
        self._results: list[Connection] = []
        self._processes: list[Any] = []
        with _quiet_tokenizers(), _quiet_jax():
            for tasks in self._tasks:
                receiving, sending = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(work, tasks, sending, os.getpid()), daemon=True)
                process.start()
                # Closed before the next fork: a copy in another worker would keep the pipe of a dead one open.
                sending.close()
                self._results.append(receiving)
                self._processes.append(process)

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for tasks in self._tasks:
            tasks.cancel_join_thread()
            tasks.close()
        for results in self._results:
            results.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The result of each task, in order; at most two tasks per worker are under way."""
        received = 0
        under_way: deque[Task] = deque()
        for sent, task in enumerate(tasks):
            self._tasks[sent % self._count].put(task)
            under_way.append(task)
            if len(under_way) >= CHUNKS_PER_WORKER * self._count:
                yield self._receive(received % self._count, under_way.popleft())
                received += 1
        for number, task in enumerate(under_way, received):
            yield self._receive(number % self._count, task)

    def _receive(self, worker: int, task: Task) -> Result:
        try:
            result, error = self._results[worker].recv()
        except (EOFError, OSError) as ended:  # where a result should begin, or within one
            self._processes[worker].join(timeout=5)
            code = self._processes[worker].exitcode
            raise DataError(
                f"a process that tokenises died (exit code {code}; -9 is often a lack of memory) with "
                f"{self._name(task)} before it. Look at these rows for one that is very long; or try data.workers: 0."
            ) from ended
        if error is not None:
            raise error
        return result


def _serve(work: Callable[[Any], Any], tasks: Any, results: Connection, parent: int) -> None:
    # Ctrl-C reaches the whole process group; the parent answers it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what was inherited stays
    while True:
        try:
            task = tasks.get(timeout=2.0)
        except queue.Empty:
            if os.getppid() != parent:
                return  # The parent was killed; nobody will ask again.
            continue
        try:
            results.send((work(task), None))
        except BrokenPipeError:
            return
        except Exception as error:  # Whatever it is: it is raised again where the result is read.
            results.send((None, error))


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for cycles a hundred times less often: a chunk makes many small records, and hardly any cycle among them."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    """Fork with the tokenizers' own threads off: each worker is one core, and threads do not survive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _quiet_jax() -> Iterator[None]:
    """Fork without the warning that JAX, wherever it was imported, gives of every fork: a worker never calls it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        yield
