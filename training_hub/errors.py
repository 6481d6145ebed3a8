"""The errors this package raises: one tree, one type per remedy.

    HubError
    ├── RecipeError (ValueError)      a setting is wrong: change the recipe
    ├── DataError (ValueError)        a row, a template or a tokenizer is wrong: change the data
    ├── BackendError (RuntimeError)   an engine cannot do what is asked, or is not installed
    ├── CheckpointError (RuntimeError) a checkpoint is missing, damaged or of another run
    ├── TrainingError (RuntimeError)  the run itself went wrong (loss is not finite, memory)
    ├── DiskError (RuntimeError)      the output folder cannot be written: no room, or it is gone
    ├── Interrupted                   the run was asked to stop and saved its state
    └── LaunchError (RuntimeError)    processes could not be started or one of them died

Every message says where, what was found, what is allowed and what to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


class HubError(Exception):
    """What all errors of training_hub have in common; catch it to catch them all.

    `problems` holds each finding as one line; the message joins them, so that all are seen at once.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.told())

    def told(self, shown: Callable[[str], str] = str) -> str:
        """The message, each problem as `shown` writes it: a terminal must not be given control characters."""
        lines = [shown(problem) for problem in self.problems]
        if len(lines) == 1:
            return lines[0]
        # The last line may count those that are not told: "and 680 more problems".
        more = [re.fullmatch(r"and ([\d,]+) more problems", line) for line in self.problems]
        count = sum(int(match[1].replace(",", "")) if match else 1 for match in more)
        return f"{count:,} problems:\n" + "\n".join(f"  - {line}" for line in lines)


class RecipeError(HubError, ValueError):
    """A setting is unknown, of the wrong kind, out of range or at odds with another."""

    exit_code = 2


class DataError(HubError, ValueError):
    """A file, row, template or tokenizer cannot be trained on as it is."""

    exit_code = 3


class BackendError(HubError, RuntimeError):
    """The chosen backend cannot run this recipe here, or a package it needs is missing."""

    exit_code = 4


class CheckpointError(HubError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to a different run."""

    exit_code = 5


class TrainingError(HubError, RuntimeError):
    """The run stopped because going on would have produced a broken model."""

    exit_code = 6


class DiskError(HubError, RuntimeError):
    """The output folder could not be written: no room, no permission, or it is gone. What was saved is as it was.

    The exit code is EX_TEMPFAIL of sysexits.h, which schedulers take as "try again later".
    """

    exit_code = 75


class LaunchError(HubError, RuntimeError):
    """Processes could not be started, or one of them died."""

    exit_code = 7


class Interrupted(HubError):
    """The run was asked to stop (SIGTERM, SIGINT); its state is saved and it can go on from there.

    `signal_number` is the signal received, so that a command line can exit with 128 + signal_number.
    """

    def __init__(self, problems: str | Sequence[str], signal_number: int):
        super().__init__(problems)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
