"""What a teacher said about each trained token, kept on disk: memory-mapped, in parts that are whole or not there.

    part-000012/    ids.bin int32 [rows, width]    logs.bin float32 [rows, width], or none
                    last.bin float32 [rows]        counts.bin int64 [samples]: the rows of each
                    manifest.json                  size and sha256 of every file

A row is a trained token, in the order of the samples. A part holds whole samples, as many as have about ROWS_PER_PART
trained tokens: a function of the data alone, so that a run that was stopped finds the parts that it had made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training_hub.data.store import TokenStore
from training_hub.folders import MANIFEST, damage, write_whole
from training_hub.types import Console

ROWS_PER_PART = 1 << 16


@dataclass(frozen=True, eq=False)
class Rows:
    """Targets of some trained tokens: ids [rows, width], logs [rows, width] or None, last [rows]."""

    ids: np.ndarray
    logs: np.ndarray | None
    last: np.ndarray


def borders(store: TokenStore) -> list[int]:
    """The samples at which parts begin, and last how many there are."""
    total = np.cumsum(store.trained_tokens)
    parts = (total - 1) // ROWS_PER_PART
    return [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(store)]


def missing_parts(folder: Path, starts: Sequence[int], console: Console) -> list[int]:
    """The numbers of the parts that are not there, or damaged, which is said."""
    names = [_part(folder, number) for number in range(len(starts) - 1)]
    there = [place for place in names if place.exists()]
    size = sum(file.stat().st_size for place in there for file in place.iterdir() if file.name != MANIFEST) / 1e6
    wrong = {place for place in names if not place.exists()}
    with console.progress("checking kept targets", size, "MB") as advance:
        for place in there:
            problems = damage(place, lambda count: advance(count / 1e6))
            if problems:
                console.say(f"teacher: kept targets are damaged and made again ({problems[0]})")
                wrong.add(place)
    return [number for number, place in enumerate(names) if place in wrong]


def write_part(folder: Path, number: int, rows: Rows, counts: np.ndarray) -> None:
    """Write part `number`: targets of samples with `counts` [samples] trained tokens each."""
    with write_whole(_part(folder, number), replace=True) as aside:
        (aside / "ids.bin").write_bytes(rows.ids.astype("<i4").tobytes())
        if rows.logs is not None:
            (aside / "logs.bin").write_bytes(rows.logs.astype("<f4").tobytes())
        (aside / "last.bin").write_bytes(rows.last.astype("<f4").tobytes())
        (aside / "counts.bin").write_bytes(counts.astype("<i8").tobytes())


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}"


class TargetStore:
    """The rows of samples by their numbers, from the parts in `folder`, which begin at the samples `starts`.

    keep_alive: what must live as long as this does.
    """

    def __init__(self, folder: Path, starts: Sequence[int], width: int, keep_alive: object = None):
        self._starts = np.asarray(starts[:-1])
        parts = [_part(folder, number) for number in range(len(starts) - 1)]
        self._ids = [_mapped(part / "ids.bin", "<i4", width) for part in parts]
        has_logs = all((part / "logs.bin").exists() for part in parts)
        self._logs = [_mapped(part / "logs.bin", "<f4", width) for part in parts] if has_logs else None
        self._last = [_mapped(part / "last.bin", "<f4") for part in parts]
        counts = [np.fromfile(part / "counts.bin", "<i8") for part in parts]
        self._ends = [np.cumsum(each) for each in counts]
        self._keep_alive = keep_alive

    def rows(self, samples: Sequence[int]) -> Rows:
        """The targets of these samples, one after the other."""
        places = [self._place(sample) for sample in samples]

        def gathered(columns: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([columns[part][start:end] for part, start, end in places])

        return Rows(gathered(self._ids), gathered(self._logs) if self._logs else None, gathered(self._last))

    def _place(self, sample: int) -> tuple[int, int, int]:
        part = int(np.searchsorted(self._starts, sample, side="right")) - 1
        within = sample - int(self._starts[part])
        ends = self._ends[part]
        return part, int(ends[within - 1]) if within else 0, int(ends[within])


def _mapped(path: Path, dtype: str, width: int | None = None) -> np.ndarray:
    count = path.stat().st_size // np.dtype(dtype).itemsize
    shape = (count,) if width is None else (count // width, width)
    return np.memmap(path, dtype, mode="r", shape=shape) if count else np.empty(shape, dtype)
