"""Rows as they will be trained: what each becomes, token by token with weights, and counts of what happens to all.

A row goes through the very functions that make the token store of a run, so what is shown is what is trained. A row
that cannot be trained is shown with its problems, and the others are still prepared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from training_hub.data.pipeline import Task, Work, read_tasks
from training_hub.data.prepare import Kitchen, Prepared, prepare
from training_hub.data.rejects import raw_text
from training_hub.data.sources import Source, open_sources
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.recipe import Recipe
from training_hub.types import Console, Origin, Sample

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MOST_RAW_CHARACTERS = 2000
SET_ASIDE = "set aside for validation, not trained"
DUPLICATE = "exact duplicate of an earlier row, left out"
# How a line begins that sums up what the lines after it say of single rows.
OF_ALL_ROWS = ("training.max_seq_len: ", "data.max_bad_share: ")
TOLD = {
    "dropped": "left out: longer than training.max_seq_len",
    "truncated": "cut at training.max_seq_len",
    "tokens_lost": "tokens lost by that",
    "split": "split at training.max_seq_len",
    "pieces_untrained": "pieces without a trained token, left out",
}


@dataclass(frozen=True)
class ShownSample:
    """One training sequence. tokens[t] is the text that ids[t] adds, "" for a token that only begins a character.

    weights[t] is the weight of the loss of predicting ids[t]; is_special[t] says whether the tokenizer flags it so.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    weights: tuple[float, ...]
    is_special: tuple[bool, ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True)
class ShownRow:
    """One row of the data: its samples, or its problems; `raw` is the beginning of a row that has problems."""

    origin: Origin
    samples: tuple[ShownSample, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    raw: str = ""


@dataclass(frozen=True)
class Preview:
    """Rows as they will be trained, and `counts` over all of the data (plain JSON)."""

    rows: tuple[ShownRow, ...]
    counts: dict[str, Any] = field(default_factory=dict)


def preview(
    recipe: Recipe,
    *,
    tokenizer: ChatTokenizer,
    template: ChatTemplate | None,
    console: Console,
    num_rows: int = 3,
    lines: Sequence[int] = (),
) -> Preview:
    """The first `num_rows` rows of the recipe's data, or those on `lines`, and counts over all rows.

    Raises DataError for what no row can be blamed for: files that are not there, no template, lines that are not there.
    """
    kitchen = Kitchen(recipe, tokenizer, template, console)
    sources = open_sources(recipe.data)
    work = replace(kitchen.work(sources), skips_bad=False)  # a row that is left out is shown with the reason
    chosen = choose(sources, work, recipe.data.max_rows, num_rows, lines)
    prepared, problems = prepare_all(recipe, tokenizer, template, console)
    shown = [show_row(task, work, tokenizer) for task in chosen]
    if prepared is None:
        return Preview(tuple(shown), {"problems": num_problems(problems), "problem_lines": problems})
    if recipe.data.pretraining:
        broken = [row for row in shown if row.problems]
        return Preview((*show_blocks(prepared.train, tokenizer, num_rows, lines), *broken), counts(prepared, problems))
    shown = [replace(row, notes=(*row.notes, *fate(row, prepared))) for row in shown]
    return Preview(tuple(shown), counts(prepared, problems) | unrolled(recipe, prepared))


def choose(
    sources: Sequence[Source], work: Work, max_rows: int | None, num_rows: int, lines: Sequence[int]
) -> list[Task]:
    """The rows to show, each as a task of its own. Raises DataError for lines that are not there."""
    wanted = set(lines)
    chosen: list[Task] = []
    last = 0
    for task in read_tasks(sources, work, Unheard(), max_rows):
        for origin, raw in task.rows:
            last = max(last, origin.line)
            if not wanted or origin.line in wanted:
                chosen.append(replace(task, rows=[(origin, raw)]))
            if not wanted and len(chosen) >= num_rows:
                return chosen[:num_rows]
    absent = sorted(wanted - {task.rows[0][0].line for task in chosen})
    if absent:
        named = ", ".join(str(line) for line in absent)
        raise DataError(f"--row: there is no row at line {named}; the last one is at line {last:,}.")
    return chosen


def prepare_all(
    recipe: Recipe, tokenizer: ChatTokenizer, template: ChatTemplate | None, console: Console
) -> tuple[Prepared | None, list[str]]:
    """What a run would train on, without the rows that have problems, and these problems.

    None where nothing is left. Data without problems comes from the run's cache, or is put there for it.
    """
    settings: dict[str, Any] = {"tokenizer": tokenizer, "template": template}
    try:
        return prepare(recipe, console=console, **settings), []
    except DataError as error:
        problems = error.problems
    try:
        return prepare(recipe, console=Unheard(), leaves_out_problems=True, **settings), problems
    except DataError:  # every row has a problem, or what is left cannot be split: `problems` say why
        return None, problems


def show_row(task: Task, work: Work, tokenizer: ChatTokenizer) -> ShownRow:
    """What the one row of `task` becomes."""
    origin, raw = task.rows[0]
    block, found = work(task)
    samples = [show_sample(sample, tokenizer) for sample in _samples(block.columns, block.lengths, origin)]
    notes = [*found.facts, *found.notes]
    notes += [text if count == 1 else f"{count:,} {text}" for key, text in TOLD.items() if (count := found.tally[key])]
    problems = (*found.problems, *(line for entry in found.rejects for line in entry["problems"]))
    return ShownRow(
        origin, tuple(samples), problems, tuple(notes), raw_text(raw, MOST_RAW_CHARACTERS) if problems else ""
    )


def show_sample(sample: Sample, tokenizer: ChatTokenizer) -> ShownSample:
    """The sample with the text of each token."""
    special = set(tokenizer.special_ids.values())
    ids = tuple(int(one) for one in sample.ids)
    return ShownSample(
        ids,
        tuple(token_texts(ids, tokenizer)),
        tuple(float(weight) for weight in sample.weights),
        tuple(one in special for one in ids),
    )


def token_texts(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """The text that each token adds to those before it; joined, the text of all.

    A character of several tokens stands at the last of them. Decoding begins a few tokens before each, since what a
    token says may depend on its neighbour (SentencePiece drops the space of the first).
    """
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        text = _decoded(ids[start:end], tokenizer)
        if text.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(_decoded(ids[start:read], tokenizer)) :])
        start, read = read, end
    return texts


def _decoded(ids: Sequence[int], tokenizer: ChatTokenizer) -> str:
    if not ids:
        return ""
    return tokenizer.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def show_blocks(store: TokenStore, tokenizer: ChatTokenizer, num_rows: int, lines: Sequence[int]) -> Iterator[ShownRow]:
    """The first blocks of documents, or those that begin in a document of `lines`."""
    numbers = np.flatnonzero(np.isin(store.column("lines"), lines)) if lines else range(min(num_rows, len(store)))
    for number in numbers:
        sample = store[int(number)]
        note = f"block {int(number) + 1} of {len(store):,}, begins in this document"
        yield ShownRow(sample.origin, (show_sample(sample, tokenizer),), notes=(note,))


def fate(row: ShownRow, prepared: Prepared) -> tuple[str, ...]:
    """What became of a row that has samples, where it is not trained."""
    if not row.samples or _holds(prepared.train, row.origin):
        return ()
    is_aside = prepared.validation is not None and _holds(prepared.validation, row.origin)
    return (SET_ASIDE if is_aside else DUPLICATE,)


def _holds(store: TokenStore, origin: Origin) -> bool:
    at_line = np.flatnonzero(store.column("lines") == origin.line)
    return any(store.origin(int(number)) == origin for number in at_line)


def counts(prepared: Prepared, problems: Sequence[str]) -> dict[str, Any]:
    """What happened to all rows: the report of a run, with what is not trained, and the problems."""
    report = prepared.report
    untrained = report["tokens"] - report["trained_tokens"]
    found = {"problems": num_problems(problems), "problem_lines": list(problems), "untrained_tokens": untrained}
    return {**dict.fromkeys(("dropped", "truncated", "unrolled"), 0), **report, **found}


def num_problems(lines: Sequence[str]) -> int:
    """How many problems of rows these lines stand for; some only count those that are not told, or speak of all."""
    more = [re.fullmatch(r"and ([\d,]+) more problems", line) for line in lines if not line.startswith(OF_ALL_ROWS)]
    return sum(int(match[1].replace(",", "")) if match else 1 for match in more)


def unrolled(recipe: Recipe, prepared: Prepared) -> dict[str, int]:
    """How many rows became several samples, where turns are unrolled."""
    if recipe.data.turns != "unroll":
        return {}
    lines, parts = prepared.train.column("lines"), prepared.train.column("parts")
    _, sizes = np.unique(np.stack([parts.astype(np.int64), lines]), axis=1, return_counts=True)
    return {"unrolled": int((sizes > 1).sum()), "unrolled_samples": int(sizes[sizes > 1].sum())}


def _samples(columns: Mapping[str, np.ndarray], lengths: np.ndarray, origin: Origin) -> Iterator[Sample]:
    start = 0
    for length in lengths:
        piece = slice(start, start + int(length))
        yield Sample(columns["ids"][piece], columns["weights"][piece], origin)
        start += int(length)


class Unheard:
    """A console for what is done a second time, and was told the first time."""

    def say(self, line: str) -> None:
        pass

    def progress(
        self, what: str, total: float | None = None, unit: str = "rows"
    ) -> AbstractContextManager[Callable[[float], None]]:
        return nullcontext(lambda count: None)
