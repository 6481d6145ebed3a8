"""From sources to a token store: rows are decoded, parsed, encoded and fitted chunk by chunk, and appended in order.

Memory stays constant: rows pass by in chunks, a bounded number of chunks is under way, and samples go to disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from training_hub.data.encode import Encoded, Encoder
from training_hub.data.formats import FORMATS, Format, FormatSettings, detect, parse, with_our_columns
from training_hub.data.lengths import fit
from training_hub.data.readers import Broken, RawRow, decode
from training_hub.data.sources import Part, Source
from training_hub.data.store import PartName, SampleBlock, StoreWriter, content_hash
from training_hub.data.workers import Workers, can_fork, num_cores
from training_hub.errors import DataError
from training_hub.types import Console, Origin, Sample

ROWS_PER_CHUNK = 256
# Below this, starting processes takes longer than it saves.
ROWS_WORTH_WORKERS = 5_000
BYTES_WORTH_WORKERS = 4 << 20
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Task:
    """Rows of one part, to be turned into samples."""

    source: int
    part: int
    format: str
    rows: list[tuple[Origin, RawRow]]


@dataclass
class Findings:
    """What was found on the way: the first problems and how many there are, counts, facts to say once, notes by rows."""

    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    facts: dict[str, None] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def add_problems(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.num_problems += 1
            if len(self.problems) < PROBLEMS_SHOWN:
                self.problems.append(line)

    def add(self, other: Findings) -> None:
        self.problems += other.problems[: PROBLEMS_SHOWN - len(self.problems)]
        self.num_problems += other.num_problems
        self.tally += other.tally
        self.facts |= other.facts
        self.notes += other.notes

    def refuse(self) -> None:
        """Raise DataError with the problems, if there are any."""
        if self.num_problems > len(self.problems):
            rest = self.num_problems - len(self.problems)
            raise DataError([*self.problems, f"and {rest:,} more rows with problems"])
        if self.problems:
            raise DataError(self.problems)


@dataclass(frozen=True)
class Work:
    """What is done to a chunk; the same in this process and in others. `longest` is None where nothing is cut."""

    encoder: Encoder
    settings: FormatSettings
    longest: int | None
    policy: str

    def __call__(self, task: Task) -> tuple[SampleBlock, Findings]:
        findings = Findings()
        rows = [parsed for raw in task.rows if (parsed := self._parse(raw, FORMATS[task.format], findings)) is not None]
        samples: list[Sample] = []
        hashes: list[np.ndarray] = []
        for row, encoded in zip(rows, self.encoder.encode(rows), strict=True):
            kept = self._keep(row.origin, encoded, findings)
            digest = content_hash(kept)
            samples += kept
            hashes += [digest] * len(kept)
        findings.tally["rows"] += len(task.rows)
        return SampleBlock.of(samples, hashes, task.source, [task.part] * len(samples)), findings

    def _parse(self, numbered: tuple[Origin, RawRow], entry: Format, findings: Findings) -> Any:
        origin, raw = numbered
        row = decode(raw, origin)
        if isinstance(row, Broken):
            findings.add_problems([row.problem])
            return None
        try:
            parsed = parse(row, origin, entry, self.settings)
        except DataError as error:
            findings.add_problems(error.problems)
            return None
        findings.facts |= dict.fromkeys(parsed.notes)
        return parsed.row

    def _keep(self, origin: Origin, encoded: Encoded, findings: Findings) -> list[Sample]:
        findings.add_problems(encoded.problems)
        findings.notes.update(encoded.notes)
        if self.longest is None:
            return list(encoded.samples)
        trained = [sample for sample in encoded.samples if sample.weights.any()]
        if len(trained) < len(encoded.samples):
            findings.add_problems([f"{origin}: nothing to train on: no token of it has a weight. Leave the row out."])
        if self.policy == "error":
            findings.add_problems(self._too_long(sample) for sample in trained if len(sample) > self.longest)
        return fit(trained, self.longest, self.policy, findings.tally)

    def _too_long(self, sample: Sample) -> str:
        return (
            f"{sample.origin}: {len(sample):,} tokens, more than training.max_seq_len {self.longest:,}. Raise it, or say "
            "what to do with such rows: data.overlong: drop, truncate or split."
        )


def write_samples(
    sources: Sequence[Source],
    work: Work,
    writer: StoreWriter,
    console: Console,
    max_rows: int | None = None,
    workers: int | None = None,
) -> tuple[tuple[PartName, ...], Findings]:
    """Append every sample of the sources to `writer`, in order; the names of the parts and what was found.

    Raises DataError listing the problems of all rows.
    """
    parts = [part for source in sources for part in source.parts]
    findings = Findings()
    tasks = _first_rows(_tasks(sources, work.settings, findings, console), max_rows)
    count = num_workers(parts, workers)
    total, unit, size = _measure(parts, max_rows)
    with (
        Workers(work, count) if count else nullcontext() as pool,
        console.progress("tokenising", total=total, unit=unit) as advance,
    ):
        seen: list[float] = []

        def watched() -> Iterator[Task]:
            for task in tasks:
                seen.append(size(task))
                yield task

        for done, (block, found) in enumerate(pool.map(watched()) if pool else map(work, watched())):
            writer.append(block)
            findings.add(found)
            advance(seen[done])
    findings.refuse()
    return tuple((part.name, part.unit) for part in parts), findings


def num_workers(parts: Sequence[Part], asked: int | None) -> int:
    """Processes for this much data; 0 to work in this one."""
    if not can_fork():
        return 0
    if asked is not None:
        return asked
    rows = sum(part.num_rows or 0 for part in parts)
    size = sum(part.num_bytes or 0 for part in parts)
    is_unknown = any(part.num_rows is None and part.num_bytes is None for part in parts)
    return num_cores() if is_unknown or rows > ROWS_WORTH_WORKERS or size > BYTES_WORTH_WORKERS else 0


def _tasks(sources: Sequence[Source], settings: FormatSettings, findings: Findings, console: Console) -> Iterator[Task]:
    part_number = -1
    for number, source in enumerate(sources):
        format_name = source.format
        for part in source.parts:
            part_number += 1
            rows = part.rows(findings.tally)
            if format_name == "auto":
                format_name, rows = _detected(rows, settings, source, findings, console)
            if format_name == "auto":
                continue
            while chunk := list(islice(rows, ROWS_PER_CHUNK)):
                yield Task(number, part_number, format_name, chunk)


def _detected(
    rows: Iterator[tuple[Origin, RawRow]],
    settings: FormatSettings,
    source: Source,
    findings: Findings,
    console: Console,
) -> tuple[str, Iterator[tuple[Origin, RawRow]]]:
    """The format of the first row that can be read, said aloud, and the rows from the first on; "auto" for no rows."""
    passed: list[tuple[Origin, RawRow]] = []
    for origin, raw in rows:
        passed.append((origin, raw))
        row = decode(raw, origin)
        if isinstance(row, Broken):
            continue
        try:
            found = detect(with_our_columns(row, settings.columns), origin)
        except DataError as error:
            findings.add_problems(error.problems)
            return "auto", iter(())
        console.say(f"data: {source.name}: {found.name} rows ({found.columns})")
        return found.name, chain(passed, rows)
    findings.add_problems(raw.problem for _, raw in passed if isinstance(raw, Broken))
    return "auto", iter(())


def _first_rows(tasks: Iterator[Task], limit: int | None) -> Iterator[Task]:
    """The tasks up to the row `limit`, the last one cut to it."""
    left = limit
    for task in tasks:
        if left is None:
            yield task
            continue
        if left <= 0:
            return
        yield Task(task.source, task.part, task.format, task.rows[:left])
        left -= len(task.rows)


def _measure(parts: Sequence[Part], max_rows: int | None) -> tuple[float | None, str, Callable[[Task], float]]:
    """Total, unit and size of a task for the progress shown: megabytes of JSON lines, else rows."""
    if max_rows is None and all(part.num_bytes is not None for part in parts):
        total = sum(part.num_bytes or 0 for part in parts) / 1e6
        return total, "MB", lambda task: sum(len(raw) for _, raw in task.rows if isinstance(raw, bytes)) / 1e6
    known = [part.num_rows for part in parts if part.num_rows is not None]
    rows = float(sum(known)) if len(known) == len(parts) else None
    if max_rows is not None:
        rows = min(rows, max_rows) if rows is not None else None
    return rows, "rows", lambda task: float(len(task.rows))
