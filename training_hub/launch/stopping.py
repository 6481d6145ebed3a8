"""Being asked to stop outside the steps: before the first, after the last, or for the second time."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training_hub.errors import Interrupted

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What a signal does in a run while its engine does not listen: it raises KeyboardInterrupt, until `is_over`.

    KeyboardInterrupt, since libraries let it pass where they catch Exception. While one is on its way out no other is
    raised, so that what it passes can clean up; one that was lost on the way (Python drops what is raised in `__del__`)
    does not make the run deaf to the next signal. An engine that has a better place to stop puts its own handlers over
    these, and these back when it has heard once.
    """

    def __init__(self) -> None:
        self.number: int = signal.SIGINT
        self.is_over = False
        self._raised: BaseException | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.is_over or self._is_on_its_way():
            return
        self.number, self._raised = number, KeyboardInterrupt()
        raise self._raised

    def _is_on_its_way(self) -> bool:
        """Whether what a signal broke into is handling what was raised here, or an error that it led to."""
        error = sys.exc_info()[1]
        while error is not None and error is not self._raised:
            error = error.__context__
        return error is not None


@contextmanager
def stoppable(stop: Stop) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT do what `stop` says; afterwards, what they did before.

    Signals reach the main thread only: elsewhere this does nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # None: a handler that Python did not set and could not set again.
    before = {number: handler for number in WATCHED if is_main and (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, stop.note)
        yield
    finally:
        stop.is_over = True
        for number, handler in before.items():
            signal.signal(number, handler)


def broken_off(number: int) -> Interrupted:
    """The error of work that stopped at once, and leaves nothing to go on from."""
    return Interrupted(
        f"{signal.Signals(number).name} received: stopped at once; nothing was written. Run the same command again.",
        signal_number=number,
    )


def interruption(number: int, newest: str | None) -> Interrupted:
    """The error of a run that stopped at once; `newest` names its newest checkpoint."""
    kept = f"the newest checkpoint is {newest}" if newest else "no checkpoint had been written"
    return Interrupted(
        f"{signal.Signals(number).name} received: stopped at once; {kept}. Run the same command again to go on from "
        "there.",
        signal_number=number,
    )
