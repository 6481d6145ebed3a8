"""How a worker ended: what it leaves in the run folder, and what its caller makes of that."""

from __future__ import annotations

import builtins
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.errors import HubError, Interrupted, LaunchError
from training_hub.folders import write_json


@dataclass(frozen=True)
class Ending:
    """What a worker said last: the result of its run, or the error that ended it.

    A LaunchError is what a process raises that has lost the others: the cause lies with one of these.
    """

    rank: int
    time: float
    result: dict[str, Any] | None = None
    type: str = ""
    problems: tuple[str, ...] = ()
    signal_number: int = 0

    @property
    def is_echo(self) -> bool:
        return self.type == LaunchError.__name__


def log_of(run_folder: Path, rank: int) -> Path:
    """The file with all that a worker writes to standard output and error."""
    return run_folder / "logs" / f"rank{rank}.log"


def ending_of(run_folder: Path, rank: int) -> Path:
    """The file in which a worker says how it ended."""
    return run_folder / "logs" / f"rank{rank}.json"


def leave_result(run_folder: Path, rank: int, result: dict[str, Any]) -> None:
    """Write down the result of this worker's run."""
    write_json(ending_of(run_folder, rank), {"rank": rank, "time": time.time(), "result": result})


def leave_error(run_folder: Path, rank: int, error: BaseException) -> None:
    """Write down the error that ends this worker."""
    content = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "problems": error.problems if isinstance(error, HubError) else [str(error)],
        "signal_number": error.signal_number if isinstance(error, Interrupted) else 0,
    }
    write_json(ending_of(run_folder, rank), content)


def read_ending(run_folder: Path, rank: int) -> Ending | None:
    """What the worker left; None where it could not, as when it was killed."""
    path = ending_of(run_folder, rank)
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Ending(**{**content, "problems": tuple(content.get("problems", ()))})


def error_of(ending: Ending, where: str) -> Exception:
    """The worker's error, of its own type where that is one of ours or Python's; `where` says which worker it was."""
    *before, last = ending.problems or ("",)
    problems = [*before, f"{last} {where}"]
    if ending.type == Interrupted.__name__:
        return Interrupted(ending.problems, ending.signal_number)
    ours = next((kind for kind in HubError.__subclasses__() if kind.__name__ == ending.type), None)
    if ours is not None:
        return ours(problems)
    kind = getattr(builtins, ending.type, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind("\n".join(problems))
    return LaunchError(f"{ending.type}: " + "\n".join(problems))
