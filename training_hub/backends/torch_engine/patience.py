"""A store of torch whose calls come back: by itself it waits for ever for a server that was stopped, not ended."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any


class PatientStore:
    """The store, its calls made in a thread of its own and given up after `seconds`, with a RuntimeError.

    A thread that waits for ever is left alone: what it waits for will not come, and every later call fails at once.
    """

    def __init__(self, store: Any, seconds: float):
        self._store, self._seconds = store, seconds
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._is_stuck = False
        threading.Thread(target=self._work, daemon=True).start()

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        found: bytes = self._call(lambda: self._store.get(key))
        return found

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._call(lambda: self._store.check(keys)))

    def wait(self, keys: Sequence[str], limit: timedelta) -> None:
        self._call(lambda: self._store.wait(keys, limit), limit.total_seconds())

    def _call(self, work: Callable[[], Any], longer: float = 0.0) -> Any:
        if self._is_stuck:
            raise RuntimeError("rank 0, which keeps what the others say, has stopped answering")
        future: Future[Any] = Future()
        self._asked.put((work, future))
        try:
            return future.result(self._seconds + longer)
        except TimeoutError as error:
            self._is_stuck = True
            raise RuntimeError(
                f"rank 0, which keeps what the others say, did not answer for {self._seconds:g} s"
            ) from error

    def _work(self) -> None:
        while True:
            work, future = self._asked.get()
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
