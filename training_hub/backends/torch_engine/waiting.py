"""Waiting for batches: how much of the time it takes, and what to write where it is too much."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training_hub.data.store import TokenStore
from training_hub.data.workers import num_cores

WINDOW = 20
"""Steps looked at together: one that waits, at the border of an epoch or for a disk that wakes up, is no reason."""
LARGE_SHARE = 0.2
LEAST_SECONDS = 1.0
"""Less than this in a whole run is nothing to mend, whatever its share."""


class DataWait:
    """Measures how long steps wait for their batches: `with wait.measured(): batch = ...`, then `wait.line(...)`."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)  # waited, of that busy, whole step
        self._last = (0.0, 0.0)
        self._total = 0.0
        self._is_said = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around what makes a batch."""
        wall, busy = time.perf_counter(), _busy_seconds()
        yield
        self._last = (time.perf_counter() - wall, _busy_seconds() - busy)
        self._total += self._last[0]

    def line(self, step: int, step_seconds: float, store: TokenStore) -> str | None:
        """After a step that took `step_seconds` with its wait: what to say, once in a run; else None."""
        self._recent.append((*self._last, step_seconds))
        waited, busy, whole = (sum(column) for column in zip(*self._recent, strict=True))
        is_seen = len(self._recent) == WINDOW and waited > LARGE_SHARE * whole
        if self._is_said or not is_seen or self._total < LEAST_SECONDS:
            return None
        self._is_said = True
        cause = _computing() if busy > waited / 2 else _reading(store)
        return f"step {step}: {waited / whole:.0%} of the last {WINDOW} steps was waiting for batches. {cause}"


def _busy_seconds() -> float:
    """How long this thread has computed or been ready to: what is left of the time it waited for disk or network.

    Linux tells how long it stood in line for a core (schedstat, proc(5)); elsewhere that counts as waiting.
    """
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            computed, in_line, _ = file.read().split()
    except OSError:
        return time.thread_time()
    return (int(computed) + int(in_line)) / 1e9


def _computing() -> str:
    cores, threads = num_cores(), torch.get_num_threads()
    remedy = f"start it with OMP_NUM_THREADS={cores - 1}" if threads >= cores > 1 else "end other work on this machine"
    return (
        f"They are made by computing, in one thread beside {threads} of the model on {cores} cores; to leave it a "
        f"core, {remedy}."
    )


def _reading(store: TokenStore) -> str:
    folder = store.folder
    if folder is None:
        return "They are read slowly from memory: the machine has too little of it for its work; end other work on it."
    size = sum(file.stat().st_size for file in folder.iterdir())
    local = Path(tempfile.gettempdir())
    is_better = local.stat().st_dev != folder.stat().st_dev and shutil.disk_usage(local).free > 2 * size
    place = f"data.cache_dir: {local / 'training_hub'}" if is_better else "data.cache_dir: a folder on a faster disk"
    return (
        f"They are read, {size / 1e6:,.0f} MB in all, from {folder}. Write {place} (with data.cache: true), or give "
        "the machine more free memory than that, in which they stay once they are read."
    )
