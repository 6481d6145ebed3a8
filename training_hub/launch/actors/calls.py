"""What becomes of the answers of actors in other processes: the values, or the error that ended the call."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from training_hub.errors import HubError, Interrupted, LaunchError
from training_hub.launch.endings import Ending, error_of, log_of

Answer = dict[str, Any]
"""{"value": ...} or {"error": an Ending as plain JSON}."""


class Lost(LaunchError):
    """A process of the mesh is gone; what it was doing can be done again from the newest checkpoint."""


def actor_class(path: str) -> Any:
    """The class that `package.module:Class` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def ending_of(error: Exception) -> Ending:
    """The error of a call, as a worker would leave it."""
    return Ending(
        rank=int(os.environ.get("RANK", "0")),
        time=time.time(),
        type=type(error).__name__,
        problems=tuple(error.problems) if isinstance(error, HubError) else (str(error),),
        signal_number=error.signal_number if isinstance(error, Interrupted) else 0,
    )


def values_of(answers: Sequence[Answer | None], folder: Path | None, gone: Sequence[str] = ()) -> list[Any]:
    """The values by rank. folder: of the run, where it has their logs. gone: what is known of those that gave none.

    Raises the error of the actor that failed first; Lost where one is gone, or has lost another.
    """
    errors = [one["error"] for one in answers if one is not None and "error" in one]
    endings = [Ending(**{**error, "problems": tuple(error["problems"])}) for error in errors]
    own = sorted((one for one in endings if not one.is_echo), key=lambda one: one.time)
    if own:
        log = f"; its log: {log_of(folder, own[0].rank)}" if folder is not None else ""
        raise error_of(own[0], f"(rank {own[0].rank} of {len(answers)}{log})")
    lines = [*gone, *(problem for ending in endings[:1] for problem in ending.problems)]
    if lines:
        raise Lost(lines)
    return [one["value"] for one in answers if one is not None]
