"""Being asked to stop outside the steps: before the first, after the last, or for the second time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from training_hub.errors import Interrupted

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What a signal does in a run while its engine does not listen: it raises KeyboardInterrupt, once, until `is_over`.

    KeyboardInterrupt, since libraries let it pass where they catch Exception. An engine that has a better place to stop
    puts its own handlers over these, and these back when it has heard once.
    """

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self.is_over = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.is_over:  # the model is written, or the run is on its way out: what is left takes milliseconds
            return
        self.number, self.is_over = number, True
        raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the block SIGTERM and SIGINT end the run as Interrupted, with every file whole or not there.

    Signals reach the main thread only: elsewhere this does nothing.
    """
    stop = Stop()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop.note) for number in WATCHED}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruption(number: int, newest: str | None) -> Interrupted:
    """The error of a run that stopped at once; `newest` names its newest checkpoint."""
    kept = f"the newest checkpoint is {newest}" if newest else "no checkpoint had been written"
    return Interrupted(
        f"{signal.Signals(number).name} received: stopped at once; {kept}. Run the same command again to go on from "
        "there.",
        signal_number=number,
    )
