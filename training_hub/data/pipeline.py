"""From sources to a token store: rows are decoded, parsed, encoded and fitted chunk by chunk, and appended in order.

Memory stays constant: rows pass by in chunks, a bounded number of chunks is under way, and samples go to disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np

from training_hub.data.encode import Encoded, Encoder
from training_hub.data.formats import FORMATS, ROW_COLUMNS, FormatSettings, detect, parse, with_our_columns
from training_hub.data.lengths import fit
from training_hub.data.readers import Broken, RawRow, decode
from training_hub.data.rejects import PROBLEMS_SHOWN, TALLY, Reject, append, reject
from training_hub.data.sources import Part, Source
from training_hub.data.store import PartName, SampleBlock, StoreWriter, content_hash
from training_hub.data.templates import no_template
from training_hub.data.workers import Workers, can_fork, num_cores, seldom_collected
from training_hub.errors import DataError
from training_hub.types import Console, Conversation, Message, Origin, Sample

ROWS_PER_CHUNK = 256
BYTES_PER_CHUNK = 1 << 20
# Below this, starting processes takes longer than it saves.
CHUNKS_WORTH_WORKERS = 10
# The format of a chunk in which no row can be understood; all it gives is problems.
UNKNOWN = "unknown"

NumberedRow = tuple[Origin, RawRow]


@dataclass(frozen=True)
class Enough:
    """How far sources are read: until there are so many samples, or of documents so many tokens."""

    amount: int
    counts_tokens: bool

    def of(self, block: SampleBlock) -> int:
        """What a block adds."""
        return int(block.lengths.sum()) if self.counts_tokens else len(block.lengths)


@dataclass(frozen=True)
class Task:
    """Rows of one part, to be turned into samples."""

    source: int
    part: int
    format: str
    rows: list[NumberedRow]


@dataclass
class Findings:
    """What was found on the way: the first problems and how many there are, counts, facts to say once, notes.

    `columns` are the names in data.columns that occur. `rejects` are the rows left out of one chunk; they are written
    as they come, so that `add` does not gather them. `lengths` counts samples by their number of tokens.
    """

    problems: list[str] = field(default_factory=list)
    num_problems: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    facts: dict[str, None] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    rejects: list[Reject] = field(default_factory=list)
    lengths: Counter[int] = field(default_factory=Counter)

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
        self.columns |= other.columns
        self.lengths.update(other.lengths)

    def refuse(self) -> None:
        """Raise DataError with the problems, if there are any."""
        if self.num_problems > len(self.problems):
            rest = self.num_problems - len(self.problems)
            raise DataError([*self.problems, f"and {rest:,} more problems"])
        if self.problems:
            raise DataError(self.problems)


@dataclass(frozen=True)
class Work:
    """What is done to a chunk; the same in this process and in others. `longest` is None where nothing is cut.

    skips_bad: a row with problems is left out and kept among the rejects. leaves_out_problems: problems are only
    counted, for a look at the other rows. system: a system message that conversations get in place of their own.
    chunk_rows, chunk_bytes: what bounds a chunk.
    """

    encoder: Encoder
    settings: FormatSettings
    longest: int | None
    policy: str
    leaves_out_problems: bool = False
    skips_bad: bool = False
    system: str | None = None
    chunk_rows: int = ROWS_PER_CHUNK
    chunk_bytes: int = BYTES_PER_CHUNK

    @cached_property
    def mapped(self) -> frozenset[str]:
        """The names that data.columns gives to columns of rows."""
        return frozenset(theirs for ours, theirs in self.settings.columns.items() if ours in ROW_COLUMNS)

    def __call__(self, task: Task) -> tuple[SampleBlock, Findings]:
        findings = Findings()
        parsed = [(raw, row) for raw in task.rows if (row := self._parse(raw, task.format, findings)) is not None]
        samples: list[Sample] = []
        hashes: list[np.ndarray] = []
        for (raw, _), encoded in zip(parsed, self.encoder.encode([row for _, row in parsed]), strict=True):
            kept = self._keep(raw, encoded, findings)
            digest = content_hash(kept)
            samples += kept
            hashes += [digest] * len(kept)
        findings.tally["rows"] += len(task.rows)
        if self.leaves_out_problems:
            findings = replace(findings, problems=[], num_problems=0)
        return SampleBlock.of(samples, hashes, task.source, [task.part] * len(samples)), findings

    def refuse_without_template(self, chunk: Sequence[NumberedRow], format_name: str, source: str) -> None:
        """Raise DataError once, not for every row, where conversations come and there is no template."""
        rows = (self._parse(raw, format_name, Findings()) for raw in chunk)
        first = next((row for row in rows if row is not None), None)
        if self.encoder.masker is None and isinstance(first, Conversation):
            raise DataError(no_template(source))

    def _parse(self, numbered: NumberedRow, format_name: str, findings: Findings) -> Any:
        origin, raw = numbered
        row = decode(raw, origin)
        if isinstance(row, Broken):
            self._refuse(numbered, [row.problem], findings, is_end=row.is_end)
            return None
        if self.mapped:
            findings.columns |= self.mapped & row.keys()
        try:
            parsed = parse(row, origin, FORMATS[format_name], self.settings)
        except DataError as error:
            self._refuse(numbered, error.problems, findings)
            return None
        if parsed.notes:
            findings.facts |= dict.fromkeys(parsed.notes)
        if self.system is None:
            return parsed.row
        if isinstance(parsed.row, Conversation):
            return with_system(parsed.row, self.system)
        problem = f"{origin}: distillation.prompt is a system message, and this row is no conversation. Leave it out."
        self._refuse(numbered, [problem], findings)
        return None

    def _refuse(
        self, numbered: NumberedRow, problems: Sequence[str], findings: Findings, *, is_end: bool = False
    ) -> None:
        """Note what is wrong with a row; `is_end` where leaving it out would lose the rows behind it, too."""
        if self.skips_bad and not is_end:
            findings.tally[TALLY] += 1
            findings.rejects.append(reject(numbered[0], problems, numbered[1]))
        else:
            findings.add_problems(problems)

    def _keep(self, numbered: NumberedRow, encoded: Encoded, findings: Findings) -> list[Sample]:
        problems = encoded.problems or self._untrainable(numbered[0], encoded)
        if problems:
            self._refuse(numbered, problems, findings)
            return []
        if encoded.notes:
            findings.notes.update(encoded.notes)
        if self.longest is None:
            return list(encoded.samples)
        for sample in encoded.samples:
            findings.lengths[len(sample)] += 1
        if self.policy == "error":
            findings.add_problems(self._too_long(sample) for sample in encoded.samples if len(sample) > self.longest)
        return fit(encoded.samples, self.longest, self.policy, findings.tally)

    def _untrainable(self, origin: Origin, encoded: Encoded) -> list[str]:
        """What speaks against the weights of a row's samples."""
        if self.longest is None:
            return [_unevenly_trained(sample) for sample in encoded.samples if (sample.weights[1:] != 1.0).any()]
        # count_nonzero takes a quarter of the time of any(), and this is asked of every row.
        if all(np.count_nonzero(sample.weights) for sample in encoded.samples):
            return []
        return [f"{origin}: nothing to train on: no token of it has a weight. Leave the row out."]

    def _too_long(self, sample: Sample) -> str:
        return (
            f"{sample.origin}: {len(sample):,} tokens, more than training.max_seq_len {self.longest:,}. Raise it, or "
            "write data.overlong: drop, truncate or split."
        )


def with_system(row: Conversation, text: str) -> Conversation:
    """The conversation behind this system message, in place of its own where it begins with one."""
    rest = row.messages[1:] if row.messages and row.messages[0].role == "system" else row.messages
    return replace(row, messages=(Message("system", text), *rest))


def too_long_together(lengths: Counter[int], longest: int) -> str:
    """How many samples are longer than `longest` tokens, and what length would hold most of them or all."""
    total, over = lengths.total(), sum(count for length, count in lengths.items() if length > longest)
    seen, ordered = 0, iter(sorted(lengths))
    while seen < 0.99 * total:
        most = next(ordered)
        seen += lengths[most]
    return (
        f"training.max_seq_len: {over:,} of {total:,} samples ({over / total:.1%}) have more than {longest:,} tokens; "
        f"99% have at most {most:,}, the longest has {max(lengths):,}."
    )


def _unevenly_trained(sample: Sample) -> str:
    return (
        f"{sample.origin}: data.pretraining trains every token alike, and this row has other weights (from weight, "
        "labels, weights or a prompt). Give it as text, or turn data.pretraining off."
    )


def write_samples(
    sources: Sequence[Source],
    work: Work,
    writer: StoreWriter,
    console: Console,
    max_rows: int | None = None,
    workers: int | None = None,
    enough: Enough | None = None,
) -> tuple[tuple[PartName, ...], Findings]:
    """Append every sample of the sources to `writer`, in order; the names of the parts and what was found.

    enough: where to stop before the end, at the end of a chunk of rows.

    Raises DataError listing the problems of all rows, or the files that changed meanwhile.
    """
    parts = [part for source in sources for part in source.parts]
    findings, gathered = Findings(), 0
    count, tasks = _with_workers(read_tasks(sources, work, console, max_rows, findings.tally), workers)
    total, unit, size = _measure(parts, max_rows)
    with (
        seldom_collected(),
        Workers(work, count, _rows_of) if count else nullcontext() as pool,
        console.progress("tokenising", total=total, unit=unit) as advance,
    ):
        seen: list[float] = []

        def watched() -> Iterator[Task]:
            for task in tasks:
                seen.append(size(task))
                yield task

        for done, (block, found) in enumerate(pool.map(watched()) if pool else map(work, watched())):
            writer.append(block)
            append(found.rejects, writer.folder)
            findings.add(found)
            advance(seen[done])
            if enough is not None:
                gathered += enough.of(block)
                if gathered >= enough.amount:
                    break
    changed = [line for part in parts if (line := part.changed()) is not None]
    if changed:  # what else was found may come of that
        raise DataError(changed)
    if findings.problems and work.longest is not None and findings.tally["overlong"] > 1:
        findings.problems.insert(0, too_long_together(findings.lengths, work.longest))
        findings.num_problems += 1
    findings.refuse()
    return tuple((part.name, part.unit) for part in parts), findings


def read_tasks(
    sources: Sequence[Source],
    work: Work,
    console: Console,
    max_rows: int | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[Task]:
    """The first `max_rows` rows of the sources in chunks, in order; `tally` counts what is passed over."""
    return _first_rows(_tasks(sources, work, Counter() if tally is None else tally, console), max_rows)


def _with_workers(tasks: Iterator[Task], asked: int | None) -> tuple[int, Iterator[Task]]:
    """How many processes to start, 0 to work in this one, and all the tasks; few tasks are not worth a process."""
    if asked is not None or not can_fork():
        return (asked or 0) if can_fork() else 0, tasks
    first = list(islice(tasks, CHUNKS_WORTH_WORKERS))
    return num_cores() if len(first) == CHUNKS_WORTH_WORKERS else 0, chain(first, tasks)


def _rows_of(task: Task) -> str:
    first, last = task.rows[0][0], task.rows[-1][0]
    return f"{first} to {last.line}"


def _chunks(
    rows: Iterable[NumberedRow], most_rows: int = ROWS_PER_CHUNK, most_bytes: int = BYTES_PER_CHUNK
) -> Iterator[list[NumberedRow]]:
    """The rows in chunks of a bounded number and, as long texts are few, a bounded size."""
    chunk: list[NumberedRow] = []
    size = 0
    for numbered in rows:
        chunk.append(numbered)
        size += _size(numbered[1])
        if len(chunk) == most_rows or size >= most_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(raw: RawRow) -> int:
    """About how large a row is. Rows that come as dictionaries are long where a single text or list of ids is."""
    if isinstance(raw, bytes):
        return len(raw)
    return sum(len(value) for value in raw.values() if isinstance(value, str | list)) if isinstance(raw, dict) else 0


def _tasks(sources: Sequence[Source], work: Work, tally: Counter[str], console: Console) -> Iterator[Task]:
    """The rows of all sources in chunks. What cannot be read travels in them too, so that problems keep their order."""
    part_number = -1
    for number, source in enumerate(sources):
        format_name, num_rows = source.format, 0
        for part in source.parts:
            part_number += 1
            for chunk in _chunks(part.rows(tally), work.chunk_rows, work.chunk_bytes):
                if format_name == "auto":
                    format_name, chunk = _detected(chunk, work.settings, source, console)
                if not num_rows:
                    work.refuse_without_template(chunk, format_name, source.name)
                num_rows += len(chunk)
                yield Task(number, part_number, format_name, chunk)
                if format_name == UNKNOWN:
                    break
            if format_name == UNKNOWN:
                break
        if not num_rows:
            empty = Broken(f"{source.name}: 0 rows.", is_end=True)
            yield Task(number, part_number, UNKNOWN, [(Origin(source.name, 0), empty)])


def _detected(
    chunk: list[NumberedRow], settings: FormatSettings, source: Source, console: Console
) -> tuple[str, list[NumberedRow]]:
    """The format of the first row that can be read, said aloud, and the chunk; "auto" where none can be read.

    Where no format fits, that is the one problem, in place of the rows from there on.
    """
    for number, (origin, raw) in enumerate(chunk):
        row = decode(raw, origin)
        if isinstance(row, Broken):
            continue
        try:
            found = detect(with_our_columns(row, settings.columns), origin)
        except DataError as error:
            return UNKNOWN, [*chunk[:number], (origin, Broken(str(error), is_end=True))]
        console.say(f"data: {source.name}: {found.name} rows ({found.columns})")
        return found.name, chunk
    return "auto", chunk


def _first_rows(tasks: Iterator[Task], limit: int | None) -> Iterator[Task]:
    """The tasks up to the row `limit`, the last one cut to it."""
    if limit is None:
        yield from tasks
        return
    left = limit
    for task in tasks:
        yield replace(task, rows=task.rows[:left])
        left -= len(task.rows)
        if left <= 0:
            return


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
