"""The run folder: the one place where processes, runs and readers meet.

recipe.yaml  plan.json  preflight.json  rejects.jsonl  metrics.jsonl  result.json  report.html
checkpoints/step-N/  final/  merged/  logs/rankN.log
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.errors import CheckpointError, RecipeError
from training_hub.folders import write_text
from training_hub.recipe.load import dump, load_file
from training_hub.recipe.recipe import Recipe

# Settings that may differ between a run and its continuation: they change neither batches nor weights. A trailing dot
# stands for a whole section.
FREE_TO_CHANGE = (
    "output",
    "checkpoint.",
    "evaluation.",
    "hub.",
    "monitoring.",
    "processes.",
    "parallelism.",
    "comm.",
    "data.workers",
    "data.cache",
    "data.cache_dir",
    "data.cache_size",
    "data.max_bad_share",
    "training.on_nonfinite",
    "training.max_skipped",
    "training.preflight",
    "training.activation_checkpointing",
)


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight.json"

    @property
    def rejects(self) -> Path:
        return self.path / "rejects.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def merged(self) -> Path:
        """Where lora.merge writes the model with the final adapter in its weights."""
        return self.path / "merged"

    def earlier_recipe(self) -> Recipe | None:
        """The recipe of the run this folder holds; None where it holds none."""
        if not self.recipe.exists():
            return None
        try:
            return load_file(self.recipe)
        except RecipeError as error:
            raise CheckpointError(
                f"{self.recipe} cannot be read by this version: {error}. "
                "Set checkpoint.resume: restart to move the folder aside and begin anew."
            ) from error

    def earlier_result(self) -> dict[str, Any] | None:
        """What result.json says, None where there is none. Raises CheckpointError where it cannot be read."""
        if not self.result.exists():
            return None
        try:
            content = json.loads(self.result.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it is not an object")
        except ValueError as error:
            raise CheckpointError(
                f"{self.result} cannot be read: {error}. Delete it to go on from the newest checkpoint, or set "
                "checkpoint.resume: restart."
            ) from error
        return content

    def has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    def newest_checkpoint(self) -> str | None:
        """The name of the newest checkpoint folder, unchecked; None where there is none."""
        steps = [path.name for path in self.checkpoints.glob("step-*")] if self.checkpoints.is_dir() else []
        return max(steps, key=lambda name: (len(name), name), default=None)

    def move_aside(self) -> Path:
        """Rename the folder to the first free NAME.before-N, so that nothing of it is lost.

        Raises RecipeError where a run is at work in it, or where it cannot be renamed.
        """
        number = 1
        while (place := self.path.with_name(f"{self.path.name}.before-{number}")).exists():
            number += 1
        with self.claimed():
            try:
                self.path.rename(place)
            except OSError as error:
                raise RecipeError(
                    f"output: {self.path} cannot be moved aside to {place}: {error}. Name another output."
                ) from error
        return place

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, and hold it: a second run in it is refused while this one lives.

        The hold ends with the process, however it ends. Raises RecipeError where the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "no permission to write in it", str(folder))
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"output: {self.path} cannot be written: {error}. Name a folder you may write to."
            ) from error
        with lock:
            if not _take(lock.fileno()):
                lock.seek(0)
                raise RecipeError(
                    f"output: {self.path} is in use by another run "
                    f"({lock.read().strip() or 'just starting'}). Wait for it to end, or name another output."
                )
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            lock.flush()
            yield


def _take(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there two runs in one folder are not told apart
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Put recipe.yaml into the folder."""
    write_text(folder.recipe, dump(recipe))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The settings in which `new` is another run than `old`, one line each; [] where it is the same run."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{path}: was {before.get(path)!r}, now {after.get(path)!r}"
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path) and not _is_free(path)
    ]


def _is_free(path: str) -> bool:
    return any(path == free or (free.endswith(".") and path.startswith(free)) for free in FREE_TO_CHANGE)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
