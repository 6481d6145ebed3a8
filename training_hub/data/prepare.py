"""Data of a recipe, ready to train on: token stores for training and validation, and a report of what was counted.

Tokenised data is kept on disk under the hash of everything it was made from, so that the second run with the same
files, settings, tokenizer and template starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from training_hub.data.cache import cache_folder, kept, key_of
from training_hub.data.encode import Encoder
from training_hub.data.formats import FormatSettings, check_settings
from training_hub.data.lengths import blocks
from training_hub.data.pipeline import Work, write_samples
from training_hub.data.selection import num_shared, rows_of, split_validation, without_duplicates
from training_hub.data.sources import Source, open_object, open_path, open_sources
from training_hub.data.store import SampleBlock, StoreWriter, TokenStore, content_hash
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.folders import write_whole
from training_hub.recipe import Recipe
from training_hub.recipe.sections import Data
from training_hub.types import Console

# Part of every cache key: raise it when rows become other samples than before.
PIPELINE_VERSION = 1
BLOCKS_PER_APPEND = 64


@dataclass(frozen=True)
class Prepared:
    """Token stores of a run. `report` is plain JSON: rows, samples, tokens, what was dropped, cut and found."""

    train: TokenStore
    validation: TokenStore | None
    report: dict[str, Any]


@dataclass(frozen=True)
class Kitchen:
    """What turns sources into stores, the same for training and validation rows."""

    recipe: Recipe
    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    console: Console

    def store(self, sources: Sequence[Source], max_rows: int | None) -> TokenStore:
        """The samples of these sources, for pretraining their documents: from the cache, else made now."""
        for note in (note for source in sources for note in source.notes):
            self.console.say(f"data: {note}")
        weights = [source.weight for source in sources]
        key = self._key(sources, max_rows) if self.recipe.data.cache else None
        return kept(self._root, key, lambda folder: self._write(sources, max_rows, folder), weights, self.console)

    def blocks(self, documents: TokenStore) -> TokenStore:
        """The documents joined and cut into blocks, as a store of its own."""
        data = self.recipe.data
        size = data.block_size or self.recipe.training.max_seq_len
        key = key_of({"version": PIPELINE_VERSION, "documents": documents.fingerprint, "block_size": size})
        store = kept(
            self._root if data.cache else None,
            key,
            lambda folder: write_blocks(documents, folder, size, self.console),
            documents.source_weights,
            self.console,
        )
        # The documents may lie in a temporary folder; the blocks do not need them any more.
        return store

    @property
    def _root(self) -> Path | None:
        return cache_folder(self.recipe.data.cache_dir) if self.recipe.data.cache else None

    def _key(self, sources: Sequence[Source], max_rows: int | None) -> str | None:
        """The key of these sources' samples; None where one can be read only once."""
        parts = [
            [number, source.format, part.name, part.fingerprint()]
            for number, source in enumerate(sources)
            for part in source.parts
        ]
        if any(fingerprint is None for *_, fingerprint in parts):
            return None
        data = self.recipe.data
        chosen = ("columns", "roles", "template_arguments", "unmask", "turns", "overlong", "pretraining")
        return key_of(
            {
                "version": PIPELINE_VERSION,
                "parts": parts,
                "settings": {name: getattr(data, name) for name in chosen},
                "longest": self._longest,
                "max_rows": max_rows,
                "tokenizer": self.tokenizer.fingerprint,
                "template": self.template.fingerprint if self.template else None,
            }
        )

    @property
    def _longest(self) -> int | None:
        return None if self.recipe.data.pretraining else self.recipe.training.max_seq_len

    def _write(self, sources: Sequence[Source], max_rows: int | None, folder: Path) -> None:
        data = self.recipe.data
        settings = FormatSettings(
            columns=data.columns,
            roles=data.roles,
            unmask=data.unmask,
            pretraining=data.pretraining,
            template_arguments=data.template_arguments,
            vocab_size=self.tokenizer.vocab_size,
        )
        problems = [line for source in sources for line in check_settings(source.format, settings)]
        if problems:
            raise DataError(list(dict.fromkeys(problems)))
        encoder = Encoder(self.tokenizer, template=self.template, unmask=data.unmask, turns=data.turns)
        work = Work(encoder, settings, self._longest, data.overlong)
        with write_whole(folder, replace=True) as aside:
            writer = StoreWriter(aside)
            parts, found = write_samples(sources, work, writer, self.console, max_rows, data.workers)
            writer.finish(parts, {**found.tally, "facts": list(found.facts), "notes": dict(found.notes)})


def prepare(
    recipe: Recipe,
    *,
    tokenizer: ChatTokenizer,
    template: ChatTemplate | None,
    console: Console,
    rows: Any = None,
    validation_rows: Any = None,
) -> Prepared:
    """Training and validation samples of `recipe`; live `rows` stand in for data.path.

    Raises DataError listing the problems of all rows, each naming file, line and message.
    """
    kitchen = Kitchen(recipe, tokenizer, template, console)
    data = recipe.data
    sources = open_sources(data) if rows is None else [replace(open_object(rows, split=data.split), format=data.format)]
    everything = kitchen.store(sources, data.max_rows)
    if len(everything) == 0:
        raise DataError(_nothing_left(sources, everything))
    report = {"rows": 0, **everything.report}
    table = rows_of(everything)
    report["duplicates"] = table.num_duplicates
    train = without_duplicates(everything, table) if data.deduplicate else everything
    validation = None
    if validation_rows is not None or data.validation is not None:
        validation = kitchen.store([_validation_source(data, validation_rows)], None)
        report["validation_rows_also_trained"] = num_shared(train, validation)
    elif data.validation_fraction:
        train, validation = split_validation(train, rows_of(train), data.validation_fraction, recipe.seed)
    if data.pretraining:
        train = kitchen.blocks(train)
        validation = kitchen.blocks(validation) if validation is not None else None
    report |= _counts(train)
    report["sources"] = _per_source(sources, train)
    if validation is not None:
        report["validation"] = _counts(validation)
    for line in told(report, data.deduplicate):
        console.say(f"data: {line}")
    return Prepared(train, validation, report)


def _validation_source(data: Data, live_rows: Any) -> Source:
    if live_rows is not None:
        return replace(open_object(live_rows, "validation rows", data.split), format=data.format)
    # On the hub the training split would be the training data again; files have no splits.
    return replace(open_path(str(data.validation), "validation"), format=data.format)


def _counts(store: TokenStore) -> dict[str, int]:
    return {
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained_tokens.sum()),
    }


def _per_source(sources: Sequence[Source], store: TokenStore) -> list[dict[str, Any]]:
    samples = np.bincount(store.source_index, minlength=len(sources))
    tokens = np.bincount(store.source_index, weights=store.lengths, minlength=len(sources))
    return [
        {"name": source.name, "weight": source.weight, "samples": int(samples[number]), "tokens": int(tokens[number])}
        for number, source in enumerate(sources)
    ]


def told(report: dict[str, Any], is_deduplicated: bool) -> list[str]:
    """What a user should hear of the report: counts of what was left out, cut or noted, none where there is nothing."""
    lines = [*report.get("facts", ()), *(f"{note}: {count:,} rows" for note, count in report.get("notes", {}).items())]
    if report["duplicates"]:
        share = report["duplicates"] / max(1, report["rows"])
        what = "left out" if is_deduplicated else "kept; data.deduplicate leaves them out"
        lines.append(f"{report['duplicates']:,} rows ({share:.1%}) are exact duplicates of earlier ones, {what}")
    counted = {
        "blank_lines": "blank lines passed over",
        "dropped": "rows left out because they are longer than training.max_seq_len",
        "truncated": "rows cut at training.max_seq_len",
        "tokens_cut": "tokens cut off by that",
        "split": "rows split at training.max_seq_len",
        "validation_rows_also_trained": "validation samples that are also trained on: their loss says little",
    }
    return lines + [f"{report[key]:,} {text}" for key, text in counted.items() if report.get(key)]


def write_blocks(documents: TokenStore, folder: Path, block_size: int, console: Console) -> None:
    """The documents laid end to end and cut into blocks, as a store of its own."""
    with (
        write_whole(folder, replace=True) as aside,
        console.progress("cutting blocks", total=int(documents.lengths.sum()), unit="tokens") as advance,
    ):
        writer = StoreWriter(aside)
        held: list[tuple[int, Any]] = []
        for numbered in blocks(documents, block_size):
            held.append(numbered)
            if len(held) == BLOCKS_PER_APPEND:
                advance(_append_blocks(writer, documents, held))
                held = []
        advance(_append_blocks(writer, documents, held))
        writer.finish(documents.part_names, documents.report)


def _append_blocks(writer: StoreWriter, documents: TokenStore, held: list[tuple[int, Any]]) -> int:
    samples = [sample for _, sample in held]
    first = np.array([number for number, _ in held], np.int64)
    block = SampleBlock.of(
        samples, [content_hash([sample]) for sample in samples], 0, documents.column("parts")[first].tolist()
    )
    block.columns["sources"][:] = documents.column("sources")[first]
    writer.append(block)
    return sum(len(sample) for sample in samples)


def _nothing_left(sources: Sequence[Source], store: TokenStore) -> str:
    names = ", ".join(source.name for source in sources)
    rows, dropped = store.report.get("rows", 0), store.report.get("dropped", 0)
    if dropped:
        return (
            f"data.path: {names}: all {rows:,} rows are longer than training.max_seq_len and were dropped. Raise "
            "training.max_seq_len, or set data.overlong to truncate or split."
        )
    return f"data.path: {names}: {rows:,} rows, and nothing in them to train on."
