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
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
