"""Where a run speaks: a live terminal, plain lines, the log style of torchforge, or silence.

A console never stops a run: when its stream is closed or its terminal is gone, it falls silent.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from training_hub.errors import RecipeError
from training_hub.monitoring.words import amount, duration, printable, rate
from training_hub.types import Console

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live

STYLES = ("auto", "rich", "plain", "titan", "off")
WORTH_SAYING_SECONDS = 2.0
"""Work shorter than this leaves no line."""
BETWEEN_LINES_SECONDS = 5.0
BETWEEN_REDRAWS_SECONDS = 0.1

Clock = Callable[[], float]


class LastingStream:
    """A text stream that goes quiet when what it writes to is gone, and escapes what its encoding cannot write."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):  # ValueError: the stream is closed
            return False

    def write(self, text: str) -> int:
        self._attempt(lambda stream: stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except (OSError, ValueError):
            # A terminal that was closed or a pipe nobody reads must not end hours of training, and there is
            # nowhere left to tell it; metrics.jsonl and the log file have it all.
            self._stream = None


class LineConsole:
    """One finished line at a time, each behind `prefix()`; what logs, pipes and notebooks can show."""

    def __init__(self, stream: TextIO | None, *, prefix: Callable[[], str] = lambda: "", clock: Clock = time.monotonic):
        self._stream = LastingStream(stream)
        self._prefix = prefix
        self._clock = clock
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        with self._lock:
            self._stream.write(f"{self._prefix()}{printable(line)}\n")
            self._stream.flush()

    @contextmanager
    def progress(self, what: str, total: float | None = None, unit: str = "rows") -> Iterator[Callable[[float], None]]:
        """A line after 2 s, then one every 5 s at most, and a last one if the work took longer than 2 s."""
        work = _Work(what, total, unit, self._clock)
        next_line = work.start + WORTH_SAYING_SECONDS

        def advance(count: float) -> None:
            nonlocal next_line
            work.done += count
            if self._clock() >= next_line:
                next_line = self._clock() + BETWEEN_LINES_SECONDS
                self.say(work.state())

        with _told_at_the_end(work, self.say):
            yield advance


class TerminalConsole:
    """A terminal: lines scroll up, bars and one line about the step stay live below them.

    Nothing is drawn by a thread: a thread that holds a lock while data workers are forked would hang them.
    """

    def __init__(self, terminal: RichConsole, *, clock: Clock = time.monotonic, redirect: bool = False):
        self._terminal = terminal
        self._clock = clock
        self._redirect = redirect
        self._lock = threading.RLock()
        self._bars: dict[int, _Work] = {}
        self._standing_line: str | None = None
        self._live: Live | None = None
        self._last_drawn = -BETWEEN_REDRAWS_SECONDS

    def say(self, line: str) -> None:
        from rich.text import Text

        with self._lock:
            self._terminal.print(Text(printable(line)), soft_wrap=True)

    def show(self, line: str | None) -> None:
        """Let `line` stand below all others until the next one; None takes it away."""
        with self._lock:
            self._standing_line = line
            self._draw(now=line is None)

    @contextmanager
    def progress(self, what: str, total: float | None = None, unit: str = "rows") -> Iterator[Callable[[float], None]]:
        """A bar with rate and time left, gone at the end; then one line if the work took longer than 2 s."""
        work = _Work(what, total, unit, self._clock)

        def advance(count: float) -> None:
            with self._lock:
                work.done += count
                self._draw()

        with _told_at_the_end(work, self.say):
            try:
                with self._lock:
                    self._bars[id(work)] = work
                    self._draw(now=True)
                yield advance
            finally:
                with self._lock:
                    del self._bars[id(work)]
                    self._draw(now=True)

    def _draw(self, now: bool = False) -> None:
        if not now and self._clock() - self._last_drawn < BETWEEN_REDRAWS_SECONDS:
            return
        self._last_drawn = self._clock()
        if not self._bars and self._standing_line is None:
            if self._live is not None:
                self._live.stop()
                self._live = None
            return
        if self._live is None:
            self._live = self._start_live()
        self._live.update(self._picture(), refresh=True)

    def _start_live(self) -> Live:
        from rich.live import Live

        live = Live(
            console=self._terminal,
            auto_refresh=False,
            transient=True,
            redirect_stdout=self._redirect,
            redirect_stderr=self._redirect,
        )
        live.start()
        return live

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for work in self._bars.values():
            row = Table.grid(padding=(0, 1))
            # Without a total, a bar that has not moved says less than the count beside it.
            bar = ProgressBar(total=work.total, completed=work.done, width=24) if work.total else Text("")
            row.add_row(Text(printable(work.what)), bar, Text(work.numbers(), overflow="fold"))
            parts.append(row)
        if self._standing_line is not None:
            parts.append(Text(printable(self._standing_line), overflow="fold"))
        return Group(*parts)


class SilentConsole:
    """Says nothing."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def progress(self, what: str, total: float | None = None, unit: str = "rows") -> Iterator[Callable[[float], None]]:
        yield lambda count: None


class _Work:
    """A piece of slow work: what, how much of it is done, since when."""

    def __init__(self, what: str, total: float | None, unit: str, clock: Clock):
        self.what, self.total, self.unit = what, total, unit
        self.done = 0.0
        self._clock = clock
        self.start = clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self.start

    def numbers(self) -> str:
        """'1,200 of 10,000 rows (12 %), 340 rows/s, 26 s left'."""
        per_second = self.done / self.seconds if self.seconds > 0 else 0.0
        if self.total:
            counted = f"{amount(self.done)} of {amount(self.total)} {self.unit} ({self.done / self.total:.0%})"
            left = f", {duration((self.total - self.done) / per_second)} left" if per_second > 0 else ""
        else:
            counted, left = f"{amount(self.done)} {self.unit}", f", {duration(self.seconds)} so far"
        return f"{counted}, {rate(per_second)} {self.unit}/s{left}"

    def state(self) -> str:
        return f"{self.what}: {self.numbers()}"

    def summary(self, ended: str = "") -> str:
        per_second = rate(self.done / self.seconds)
        counted = f"{amount(self.done)} {self.unit} in {duration(self.seconds)} ({per_second} {self.unit}/s)"
        return f"{self.what}: {ended}{counted}"


@contextmanager
def _told_at_the_end(work: _Work, say: Callable[[str], None]) -> Iterator[None]:
    ended = "stopped after "
    try:
        yield
        ended = ""
    finally:
        if work.seconds > WORTH_SAYING_SECONDS:
            say(work.summary(ended))


def titan_prefix(rank: int = 0, world_size: int = 1, now: Callable[[], float] = time.time) -> str:
    """'[Trainer-0/8] 2025-10-14 13:20:00 INFO ': how torchforge's trainer opens a log line, in local time."""
    return f"[Trainer-{rank}/{world_size}] {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now()))} INFO "


def open_console(style: str = "auto", stream: TextIO | None = None) -> Console:
    """The console of `style` (a value of monitoring.console) that writes to `stream`, standard output by default.

    auto is a live terminal where the stream is one, plain lines elsewhere (files, pipes, notebooks).
    Raises RecipeError for another style.
    """
    if style not in STYLES:
        raise RecipeError(f"monitoring.console: {style!r} is not a style; known: {', '.join(STYLES)}.")
    target = sys.stdout if stream is None else stream
    if style == "off":
        return SilentConsole()
    if style == "titan":
        rank, world_size = (int(os.environ.get(name, least)) for name, least in (("RANK", "0"), ("WORLD_SIZE", "1")))
        return LineConsole(target, prefix=lambda: titan_prefix(rank, world_size))
    if style == "plain" or (style == "auto" and not _is_live_terminal(target)):
        return LineConsole(target)
    from rich.console import Console as RichConsole

    lasting: Any = LastingStream(target)
    # A real terminal also has other writers (warnings, libraries); their lines go above the live ones.
    redirect = stream is None and _is_live_terminal(target)
    terminal = RichConsole(file=lasting, force_terminal=True, force_jupyter=False, highlight=False)
    return TerminalConsole(terminal, redirect=redirect)


def _is_live_terminal(stream: TextIO | None) -> bool:
    return LastingStream(stream).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
