"""Being asked to stop: SIGTERM and SIGINT are noted, and acted on at the next step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Within the `with` block, `number` is the first signal received, or None.

    The first signal is only noted, so that a step and its checkpoint can finish; a second one acts as it would without
    us (checkpoints are atomic, so even that loses nothing saved). Signals reach the main thread only: elsewhere this
    does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Known before the first is replaced: a signal between two calls must find what to put back.
        before = {number: signal.getsignal(number) for number in WATCHED}
        self._before = {number: handler for number, handler in before.items() if handler is not None}
        try:
            for number in self._before:
                signal.signal(number, self._note)
        except BaseException:
            self._restore()
            raise
        if self.number is not None:  # heard while the others were put in: the next one must act at once
            self._restore()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
