"""Moments of a run at which a test acts: waited for, or told by the process that has come to them, never guessed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

PATIENCE_SECONDS = 120.0
"""How long to wait for what does not come; nothing is measured by it."""


def until(holds: Callable[[], object], what: str = "what the test waits for") -> None:
    """Return once it holds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE_SECONDS:g} s"
        time.sleep(0.005)


def hold(moment: Path) -> None:
    """Tell that this process has come to `moment`, and go on once what is done then is done."""
    _sign(moment, "reached").touch()
    until(_sign(moment, "over").exists, f"the end of {moment}")


def act_in(moment: Path, act: Callable[[], Found]) -> Found:
    """Act while another process holds at `moment`, and give what comes of it."""
    until(_sign(moment, "reached").exists, f"{moment}")
    found = act()
    _sign(moment, "over").touch()
    return found


def _sign(moment: Path, what: str) -> Path:
    return moment.parent / f"{moment.name}-{what}"


def when_named(checkpoint: Path, act: Callable[[], object]) -> None:
    """Have this process act once, where all of a checkpoint is written and it is about to be given its name."""
    aside, acted = str(checkpoint.parent / f".tmp-{checkpoint.name}"), []

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[0]) == aside and not acted:
            acted.append(True)
            act()

    sys.addaudithook(heard)
