"""The disk that a run writes to: what is free, what is still to be saved, and what to say when it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from training_hub.errors import DiskError
from training_hub.recipe.sections import Checkpoint

BESIDE_TENSORS = 64 * 1024
"""Bytes of names, shapes, recipe, facts and manifest in a checkpoint, generously."""


@dataclass(frozen=True)
class Room:
    """What a run writes at most, in bytes. `needed` is the most that is on disk at once beside what is there now."""

    checkpoint: int
    final: int
    needed: int

    def objection(self, folder: Path, free: int) -> str | None:
        """The line about a disk with too little room, None where it fits."""
        if free >= self.needed:
            return None
        return (
            f"output: {folder} needs {self.needed:,} bytes for this run and has {free:,} free; a checkpoint takes "
            f"{self.checkpoint:,}, the final model {self.final:,}. Make room, name another output, or lower "
            "checkpoint.keep_last."
        )


def room_for(checkpoint: int, final: int, saves: int, kept: int, settings: Checkpoint) -> Room:
    """What a run writes whose checkpoints and final model take so many bytes, given the `saves` ahead and the
    checkpoints `kept` from before. A new checkpoint is whole before an old one goes."""
    limit = settings.keep_last
    stays = saves + kept if limit is None else min(limit, saves + kept)
    stays += 1 if settings.keep_best and saves else 0
    more = max(0, stays - kept)
    in_flight = more + (1 if limit is not None and saves + kept > limit else 0)
    return Room(checkpoint, final, max(in_flight * checkpoint, more * checkpoint + final) if saves else final)


def free_bytes(folder: Path) -> int:
    """Bytes free to this user where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def disk_errors_explained(what: str, folder: Path, size: int | None = None) -> Iterator[None]:
    """Turn what the disk refuses into a DiskError with bytes needed and free; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        needed = f"{size:,} bytes are needed, " if size is not None else ""
        free = free_bytes(folder)
        raise DiskError(
            f"{what} could not be written: {error}. In {folder.parent} {needed}{free:,} are free. Earlier checkpoints "
            "are as they were. Make room, and run the same command again to go on from the newest."
        ) from error


def saves_ahead(interval: int | None, step: int, total: int, per_epoch: int, at_epoch: bool) -> int:
    """Saves at fixed steps between `step` and `total`."""
    every = [interval] if interval else []
    every += [per_epoch] if at_epoch else []
    return len({due for gap in every for due in range(gap, total + 1, gap) if due > step})
