"""Data of a recipe, ready to train on: token stores for training and validation, and a report of what was counted.

Tokenised data is kept on disk under the hash of everything it was made from, so that the second run with the same
files, settings, tokenizer and template starts at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from training_hub.data.cache import Cache, cache_folder, kept, key_of
from training_hub.data.encode import Encoder
from training_hub.data.formats import ROW_COLUMNS, FormatSettings, check_settings
from training_hub.data.lengths import blocks
from training_hub.data.pipeline import Enough, Work, write_samples
from training_hub.data.rejects import TALLY, examples, refuse_too_many, write_all
from training_hub.data.selection import num_duplicates, num_shared, split_validation, without_duplicates
from training_hub.data.sources import Source, open_object, open_path, open_sources
from training_hub.data.store import SampleBlock, StoreWriter, TokenStore, content_hash
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.folders import write_whole
from training_hub.recipe import Recipe
from training_hub.recipe.sections import Data
from training_hub.types import Console, Sample

BLOCKS_PER_APPEND = 64


@dataclass(frozen=True)
class Prepared:
    """Token stores of a run. `report` is plain JSON: rows, samples, tokens, what was dropped, cut and found."""

    train: TokenStore
    validation: TokenStore | None
    report: dict[str, Any]


@dataclass(frozen=True)
class Kitchen:
    """What turns sources into stores, the same for training and validation rows; `made` are the stores so far."""

    recipe: Recipe
    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    console: Console
    leaves_out_problems: bool = False
    system: str | None = None
    made: list[TokenStore] = field(default_factory=list)

    def store(self, sources: Sequence[Source], max_rows: int | None, samples: int | None = None) -> TokenStore:
        """The samples of these sources, for pretraining their documents: from the cache, else made now.

        samples: how many are needed, where not all are; reading stops there.
        """
        for note in (note for source in sources for note in source.notes):
            self.console.say(f"data: {note}")
        weights = [source.weight for source in sources]
        enough = self._enough(samples)
        key = self._key(sources, max_rows, enough) if self.recipe.data.cache else None
        store = kept(
            self._cache, key, lambda folder: self._write(sources, max_rows, enough, folder), weights, self.console
        )
        self.made.append(store)
        if not self.leaves_out_problems:
            refuse_too_many(store, self.recipe.data.max_bad_share)
        return store

    def blocks(self, documents: TokenStore) -> TokenStore:
        """The documents joined and cut into blocks, as a store of its own."""
        size = self._block_size
        key = key_of({"documents": documents.fingerprint, "block_size": size})
        return kept(
            self._cache,
            key,
            lambda folder: write_blocks(documents, folder, size, self.console),
            documents.source_weights,
            self.console,
        )

    @property
    def _cache(self) -> Cache | None:
        data = self.recipe.data
        return Cache(cache_folder(data.cache_dir), data.cache_size * 1e9) if data.cache else None

    def _enough(self, samples: int | None) -> Enough | None:
        """How far to read for so many samples; of documents, so far that they make as many blocks."""
        if samples is None:
            return None
        pretraining = self.recipe.data.pretraining
        return Enough(samples * self._block_size if pretraining else samples, counts_tokens=pretraining)

    @property
    def _block_size(self) -> int:
        return self.recipe.data.block_size or self.recipe.training.max_seq_len

    def _key(self, sources: Sequence[Source], max_rows: int | None, enough: Enough | None) -> str | None:
        """The key of these sources' samples; None where one can be read only once, or is not taken whole."""
        if self.leaves_out_problems:
            return None
        parts = [
            [number, source.format, part.name, part.fingerprint(self.console)]
            for number, source in enumerate(sources)
            for part in source.parts
        ]
        if any(fingerprint is None for *_, fingerprint in parts):
            return None
        data = self.recipe.data
        chosen = ("columns", "roles", "template_arguments", "unmask", "end_token", "start_token", "turns", "overlong")
        bounds = ("pretraining", "on_bad_row", "max_row_bytes")
        return key_of(
            {
                "parts": parts,
                "settings": {name: getattr(data, name) for name in (*chosen, *bounds)},
                "longest": self._longest,
                "max_rows": max_rows,
                "tokenizer": self.tokenizer.fingerprint,
                "template": self.template.fingerprint if self.template else None,
                **({"system": self.system} if self.system is not None else {}),
                **({"enough": asdict(enough)} if enough is not None else {}),
            }
        )

    @property
    def _longest(self) -> int | None:
        return None if self.recipe.data.pretraining else self.recipe.training.max_seq_len

    def work(self, sources: Sequence[Source]) -> Work:
        """What makes samples of the rows of these sources. Raises DataError for settings that do not fit them."""
        data = self.recipe.data
        settings = FormatSettings.of(data)
        problems = [line for source in sources for line in check_settings(source.format, settings)]
        if problems:
            raise DataError(list(dict.fromkeys(problems)))
        encoder = Encoder(self.tokenizer, template=self.template, unmask=data.unmask, turns=data.turns)
        skips_bad = data.on_bad_row == "skip"
        limits = (data.chunk_rows, data.chunk_bytes)
        leaves_out = self.leaves_out_problems
        return Work(encoder, settings, self._longest, data.overlong, leaves_out, skips_bad, self.system, *limits)

    def _write(self, sources: Sequence[Source], max_rows: int | None, enough: Enough | None, folder: Path) -> None:
        work, data = self.work(sources), self.recipe.data
        with write_whole(folder, replace=True) as aside, StoreWriter(aside) as writer:
            parts, found = write_samples(sources, work, writer, self.console, max_rows, data.workers, enough)
            found_too = {"facts": list(found.facts), "notes": dict(found.notes), "columns": sorted(found.columns)}
            writer.finish(parts, {**found.tally, **found_too})


def prepare(
    recipe: Recipe,
    *,
    tokenizer: ChatTokenizer,
    template: ChatTemplate | None,
    console: Console,
    rows: Any = None,
    validation_rows: Any = None,
    leaves_out_problems: bool = False,
    rejects: Path | None = None,
    system: str | None = None,
) -> Prepared:
    """Training and validation samples of `recipe`; live `rows` stand in for data.path, `system` for the system message
    of every conversation.

    Rows that data.on_bad_row leaves out are listed in the file `rejects`. Raises DataError listing the problems of all
    rows, each naming file, line and message; where `leaves_out_problems`, only for what no row can be blamed for.
    """
    kitchen = Kitchen(recipe, tokenizer, template, console, leaves_out_problems, system)
    data = recipe.data
    try:
        sources, everything, aside = _stores(kitchen, rows, validation_rows)
    finally:
        if rejects is not None:
            write_all(kitchen.made, rejects)
    _refuse_unread_columns(data, everything)
    report = {"rows": 0, **everything.report}
    report["duplicates"] = num_duplicates(everything)
    train = without_duplicates(everything) if data.deduplicate else everything
    validation = aside
    if aside is not None:
        report["validation_rows_also_trained"] = num_shared(train, aside)
    elif data.validation_fraction:
        train, validation = split_validation(train, data.validation_fraction, recipe.seed)
    if data.pretraining:
        train = kitchen.blocks(train)
        validation = kitchen.blocks(validation) if validation is not None else None
    if validation is not None and data.validation_samples is not None:
        validation = validation.subset(np.arange(min(len(validation), data.validation_samples)))
    if len(train) == 0:
        raise DataError(f"data.path: {_nothing_left(sources, train)}")
    report |= _counts(train)
    report["sources"] = _per_source(sources, train)
    if validation is not None:
        report["validation"] = _counts(validation)
        if isinstance(validation_rows, Mapping) or (aside is not None and isinstance(data.validation, list)):
            report["validation"]["sources"] = _per_source(_validation_sources(data, validation_rows), validation)
        if aside is not None and aside.report.get(TALLY):
            report["validation"][TALLY] = aside.report[TALLY]
    for line in told(report, data.deduplicate):
        console.say(f"data: {line}")
    for line in (line for store in kitchen.made for line in examples(store)):
        console.say(f"data: left out: {line}")
    return Prepared(train, validation, report)


def samples_needed(recipe: Recipe) -> int | None:
    """How many samples a run takes that reads no further; None where it reads all."""
    if not recipe.data.streaming or recipe.training.steps is None:
        return None
    return recipe.training.steps * recipe.training.global_batch_size


def _stores(kitchen: Kitchen, rows: Any, validation_rows: Any) -> tuple[list[Source], TokenStore, TokenStore | None]:
    """The training sources, all of their samples, and those of the validation rows where these are given apart.

    Raises DataError with the problems of both.
    """
    data = kitchen.recipe.data
    problems: list[str] = []
    sources, train, validation = [], None, None
    try:
        sources = open_sources(data) if rows is None else [_live(rows, "rows", data)]
        train = _not_empty("data.path", kitchen.store(sources, data.max_rows, samples_needed(kitchen.recipe)), sources)
    except DataError as error:
        problems += error.problems
    try:
        if validation_rows is not None or data.validation is not None:
            apart = _validation_sources(data, validation_rows)
            validation = _not_empty("data.validation", kitchen.store(apart, None, data.validation_samples), apart)
    except DataError as error:
        problems += error.problems
    if train is None or problems:
        raise DataError(problems)
    return sources, train, validation


def _not_empty(setting: str, store: TokenStore, sources: Sequence[Source]) -> TokenStore:
    if len(store) == 0:
        raise DataError(f"{setting}: {_nothing_left(sources, store)}")
    return store


def _live(rows: Any, name: str, data: Data) -> Source:
    return replace(open_object(rows, name, data.split), format=data.format)


def _refuse_unread_columns(data: Data, store: TokenStore) -> None:
    """A name in data.columns that no row has is a slip of the pen, unless only some rows are read."""
    wanted = {theirs for ours, theirs in data.columns.items() if ours in ROW_COLUMNS}
    is_read_whole = data.max_rows is None and not data.streaming
    unread = sorted(wanted - set(store.report["columns"])) if is_read_whole else []
    if unread:
        raise DataError(
            [f"data.columns: no row has a column {name!r}. Take it out, or write the name it has." for name in unread]
        )


def _validation_sources(data: Data, live_rows: Any) -> list[Source]:
    """The validation rows: one source, or one for each set that data.validation lists or that a mapping names."""
    if isinstance(live_rows, Mapping):
        return [_live(rows, str(name), data) for name, rows in live_rows.items()]
    if live_rows is not None:
        return [_live(live_rows, "validation rows", data)]
    # On the hub the training split would be the training data again; files have no splits.
    named = data.validation if isinstance(data.validation, list) else [str(data.validation)]
    opened = [open_path(one, "validation", data.max_row_bytes, data.streaming) for one in named]
    return [replace(source, format=data.format) for source in opened]


def _counts(store: TokenStore) -> dict[str, int]:
    return {
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained_tokens.sum()),
    }


def _per_source(sources: Sequence[Source], store: TokenStore) -> list[dict[str, Any]]:
    borders = store.source_borders.tolist()
    return [
        {
            "name": source.name,
            "weight": source.weight,
            "samples": end - start,
            "tokens": int(store.lengths[start:end].sum()),
        }
        for source, start, end in zip(sources, borders, borders[1:], strict=False)
    ]


def told(report: dict[str, Any], is_deduplicated: bool) -> list[str]:
    """What a user should hear of the report: counts of what was left out, cut or noted, none where there is nothing."""
    lines = [*report.get("facts", ()), *(f"{note}: {count:,} rows" for note, count in report.get("notes", {}).items())]
    if report["duplicates"]:
        share = report["duplicates"] / max(1, report["rows"])
        what = "left out" if is_deduplicated else "kept; data.deduplicate leaves them out"
        lines.append(f"{report['duplicates']:,} rows ({share:.1%}) are exact duplicates of earlier ones, {what}")
    if report.get(TALLY):
        share = report[TALLY] / max(1, report["rows"])
        lines.append(f"{report[TALLY]:,} rows ({share:.1%}) left out, as they cannot be read or trained on")
    if report.get("validation", {}).get(TALLY):
        lines.append(f"{report['validation'][TALLY]:,} validation rows left out, as they cannot be read or trained on")
    counted = {
        "blank_lines": "blank lines passed over",
        "dropped": "rows left out because they are longer than training.max_seq_len",
        "truncated": "rows cut at training.max_seq_len",
        "tokens_lost": "tokens lost by that",
        "trained_tokens_lost": "of these would have been trained",
        "split": "rows split at training.max_seq_len",
    }
    shared, aside = report.get("validation_rows_also_trained"), report.get("validation", {}).get("samples")
    if shared and shared == aside:
        lines.append(
            f"ALL {shared:,} validation samples are also trained on: is it the same file? Their loss says nothing"
        )
    elif shared:
        lines.append(f"{shared:,} validation samples that are also trained on: their loss says little")
    return lines + [f"{report[key]:,} {text}" for key, text in counted.items() if report.get(key)]


def write_blocks(documents: TokenStore, folder: Path, block_size: int, console: Console) -> None:
    """The documents laid end to end and cut into blocks, as a store of its own."""
    with (
        write_whole(folder, replace=True) as aside,
        StoreWriter(aside) as writer,
        console.progress("cutting blocks", total=int(documents.lengths.sum()), unit="tokens") as advance,
    ):
        parts, of_source = documents.column("parts"), documents.source_index
        held: list[tuple[int, Sample]] = []
        for numbered in blocks(documents, block_size):
            held.append(numbered)
            if len(held) == BLOCKS_PER_APPEND:
                advance(_append_blocks(writer, held, parts, of_source))
                held = []
        advance(_append_blocks(writer, held, parts, of_source))
        writer.finish(documents.part_names, documents.report)


def _append_blocks(
    writer: StoreWriter, held: list[tuple[int, Sample]], parts: np.ndarray, of_source: np.ndarray
) -> int:
    """Append blocks, each with the part and source of its first document; the number of their tokens."""
    samples = [sample for _, sample in held]
    first = np.array([number for number, _ in held], np.int64)
    block = SampleBlock.of(samples, [content_hash([sample]) for sample in samples], 0, parts[first].tolist())
    block.columns["sources"][:] = of_source[first]
    writer.append(block)
    return sum(len(sample) for sample in samples)


def _nothing_left(sources: Sequence[Source], store: TokenStore) -> str:
    names = ", ".join(source.name for source in sources)
    rows, dropped = store.report.get("rows", 0), store.report.get("dropped", 0)
    if dropped:
        return (
            f"{names}: all {rows:,} rows are longer than training.max_seq_len and were dropped. Raise "
            "training.max_seq_len, or set data.overlong to truncate or split."
        )
    return f"{names}: {rows:,} rows, and nothing in them to train on."
