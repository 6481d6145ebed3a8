"""Work that goes on in a thread while training does: one at a time, and none is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Does one piece of work at a time in a thread of its own.

    gives_up: set where nobody else will come whom the work could wait for.
    """

    def __init__(self) -> None:
        self.gives_up = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; `wait` for the work before must have been called."""
        assert self._thread is None
        # Not waited for where Python ends without us, as at a second Ctrl-C: what is half written has no name yet.
        self._thread = threading.Thread(target=self._do, args=(work,), name="writer", daemon=True)
        self._thread.start()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the work is done; raise what it raised, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
