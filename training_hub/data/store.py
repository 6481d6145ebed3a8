"""The token store: all samples of a run, memory-mapped, as columns in one folder.

    ids.bin int32 [tokens]      weights.bin float32 [tokens]    offsets.bin int64 [samples + 1]
    per sample: lengths.bin int64, sources.bin int32, parts.bin int32, lines.bin int64,
                hashes.bin 2 x uint64 (of the row's content), trained_weight.bin float64, trained_tokens.bin int64,
                begins.bin uint8 (1: the first sample of its row), repeats.bin uint8 (1: an earlier row is equal)
    store.json                  names of the parts, report of what was counted
    manifest.json               size and sha256 of every file

A folder is whole or not there (training_hub.folders). No pickle on any path.
Columns are mapped, not read: memory does not grow with the samples. A part of a store holds 8 bytes for each sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training_hub.data.rows import mark_rows
from training_hub.errors import DataError
from training_hub.folders import manifest, write_json
from training_hub.types import Origin, Sample

STORE_VERSION = 2
FACTS = "store.json"

TOKEN_COLUMNS: Mapping[str, np.dtype[Any]] = {"ids": np.dtype("<i4"), "weights": np.dtype("<f4")}
SAMPLE_COLUMNS: Mapping[str, np.dtype[Any]] = {
    "lengths": np.dtype("<i8"),
    "sources": np.dtype("<i4"),
    "parts": np.dtype("<i4"),
    "lines": np.dtype("<i8"),
    "hashes": np.dtype(("<u8", 2)),
    "trained_weight": np.dtype("<f8"),
    "trained_tokens": np.dtype("<i8"),
}
# Known once all samples are: `mark_rows`.
ROW_MARKS: Mapping[str, np.dtype[Any]] = {"begins": np.dtype("u1"), "repeats": np.dtype("u1")}
APPENDED = {**TOKEN_COLUMNS, "offsets": np.dtype("<i8"), **SAMPLE_COLUMNS}
COLUMNS = {**APPENDED, **ROW_MARKS}

# Where a sample came from: name of the file or object, and what is counted in it.
PartName = tuple[str, str]


def content_hash(samples: Sequence[Sample]) -> np.ndarray:
    """A 128-bit hash [2] uint64 of the ids and weights of a row's samples: equal for exact duplicates."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sample.ids, "<i4").data)
        digest.update(np.ascontiguousarray(sample.weights, "<f4").data)
    return np.frombuffer(digest.digest(), "<u8")


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Samples as columns, the way they travel between processes and onto disk: `lengths` [n] stands for offsets."""

    columns: Mapping[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [n] int64."""
        return self.columns["lengths"]

    @staticmethod
    def of(samples: Sequence[Sample], hashes: Sequence[np.ndarray], source: int, parts: Sequence[int]) -> SampleBlock:
        """The block of these samples; `hashes` and `parts` have one entry per sample."""
        weights = [sample.weights for sample in samples]
        columns = {
            "ids": [sample.ids for sample in samples],
            "weights": weights,
            "lengths": [len(weight) for weight in weights],
            "sources": np.full(len(samples), source),
            "parts": parts,
            "lines": [sample.origin.line for sample in samples],
            "hashes": hashes,
            "trained_weight": [weight.sum(dtype=np.float64) for weight in weights],
            "trained_tokens": [np.count_nonzero(weight) for weight in weights],
        }
        return SampleBlock({name: _column(name, values) for name, values in columns.items()})


def _column(name: str, values: Any) -> np.ndarray:
    dtype = COLUMNS[name]
    if name in TOKEN_COLUMNS:
        return np.concatenate([np.asarray(value, dtype) for value in values]) if values else np.empty(0, dtype)
    if name == "hashes":
        return np.asarray(values, "<u8").reshape(-1, 2)
    return np.asarray(values, dtype)


class StoreWriter:
    """Appends samples as columns to the files of `folder`, which `write_whole` hands out and seals.

    with write_whole(place) as folder, StoreWriter(folder) as writer: ...
    """

    def __init__(self, folder: Path):
        self._files = {name: (folder / f"{name}.bin").open("wb", buffering=1 << 18) for name in APPENDED}
        self.folder = folder
        self._tokens = 0
        self._write("offsets", np.zeros(1, "<i8"))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        for stream in self._files.values():
            stream.close()

    def append(self, block: SampleBlock) -> None:
        """Add the samples of `block` after those already there."""
        for name, values in block.columns.items():
            self._write(name, values)
        self._write("offsets", self._tokens + np.cumsum(block.lengths, dtype="<i8"))
        self._tokens += int(block.lengths.sum())

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values).tobytes())

    def finish(self, parts: Sequence[PartName], report: Mapping[str, Any]) -> None:
        """Close the files and note the names of the parts; `report` comes back as `TokenStore.report`."""
        for stream in self._files.values():
            stream.close()
        columns = {name: _mapped(self.folder / f"{name}.bin", COLUMNS[name]) for name in ("lines", "parts", "hashes")}
        for name in ROW_MARKS:
            with (self.folder / f"{name}.bin").open("wb") as stream:
                stream.truncate(len(columns["lines"]))
        marks = [_mapped(self.folder / f"{name}.bin", dtype, mode="r+") for name, dtype in ROW_MARKS.items()]
        mark_rows(columns["lines"], columns["parts"], columns["hashes"], *marks)
        facts = {"version": STORE_VERSION, "parts": [list(part) for part in parts], "report": dict(report)}
        write_json(self.folder / FACTS, facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `finish` noted. Raises DataError where it cannot be read or is of another version."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        version = facts["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a token store ({type(error).__name__}: {error}).") from error
    if version != STORE_VERSION:
        raise DataError(f"{folder}: token store of version {version}; this is {STORE_VERSION}.")
    return facts


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Samples by number: `store[i]` is a Sample, `len(store)` counts them.

    `selected` [n] int64 are the numbers of the underlying samples that this store shows, None for all; a validation
    split is two stores over one `folder` (None: in memory). Sample i is seen `source_weights[source_index[i]]` times
    per epoch.
    """

    columns: Mapping[str, np.ndarray]
    part_names: tuple[PartName, ...]
    source_weights: tuple[float, ...]
    base_fingerprint: str
    selected: np.ndarray | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: object = field(default=None, repr=False)
    folder: Path | None = None

    @staticmethod
    def open(folder: Path, source_weights: Sequence[float] = (1.0,), keep_alive: object = None) -> TokenStore:
        """The sealed store in `folder`, memory-mapped. Raises DataError where it is not one."""
        facts = read_facts(folder)
        columns = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in COLUMNS.items()}
        files = manifest(folder)["files"]
        sums = {name: files[f"{name}.bin"]["sha256"] for name in COLUMNS}
        fingerprint = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
        parts = tuple((name, unit) for name, unit in facts["parts"])
        weights, report = tuple(source_weights), facts["report"]
        return TokenStore(columns, parts, weights, fingerprint, report=report, keep_alive=keep_alive, folder=folder)

    @staticmethod
    def from_samples(samples: Sequence[Sample]) -> TokenStore:
        """A store in memory, of one source of weight 1."""
        part_of: dict[PartName, int] = {}
        parts = [part_of.setdefault((s.origin.source, s.origin.unit), len(part_of)) for s in samples]
        block = SampleBlock.of(samples, [content_hash([sample]) for sample in samples], 0, parts)
        return TokenStore.from_block(block, tuple(part_of))

    @staticmethod
    def from_block(block: SampleBlock, part_names: Sequence[PartName]) -> TokenStore:
        """A store in memory of the samples of `block`, of one source of weight 1."""
        offsets = np.concatenate([np.zeros(1, "<i8"), np.cumsum(block.lengths, dtype="<i8")])
        marks = {name: np.zeros(len(block.lengths), dtype) for name, dtype in ROW_MARKS.items()}
        columns = {**block.columns, "offsets": offsets, **marks}
        mark_rows(columns["lines"], columns["parts"], columns["hashes"], marks["begins"], marks["repeats"])
        digest = hashlib.sha256()
        for name in COLUMNS:
            digest.update(columns[name].tobytes())
        return TokenStore(columns, tuple(part_names), (1.0,), digest.hexdigest())

    def subset(self, numbers: np.ndarray) -> TokenStore:
        """A store of these of the samples, by their numbers here."""
        selected = numbers if self.selected is None else self.selected[numbers]
        return replace(self, selected=np.asarray(selected, np.int64))

    def __len__(self) -> int:
        return len(self.columns["offsets"]) - 1 if self.selected is None else len(self.selected)

    def _number(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = index % len(self)
        return index if self.selected is None else int(self.selected[index])

    def __getitem__(self, index: int) -> Sample:
        number = self._number(index)
        start, end = (int(offset) for offset in self.columns["offsets"][number : number + 2])
        ids, weights = self.columns["ids"][start:end], self.columns["weights"][start:end]
        return Sample(np.asarray(ids), np.asarray(weights), self._origin(number))

    def origin(self, index: int) -> Origin:
        """Where sample `index` came from."""
        return self._origin(self._number(index))

    def _origin(self, number: int) -> Origin:
        name, unit = self.part_names[int(self.columns["parts"][number])]
        return Origin(name, int(self.columns["lines"][number]), unit)

    def column(self, name: str) -> np.ndarray:
        """One value per sample here: any of SAMPLE_COLUMNS (hashes [n, 2]) or ROW_MARKS."""
        values = self.columns[name]
        return values if self.selected is None else values[self.selected]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [n] int64."""
        return self.column("lengths")

    @cached_property
    def shortest(self) -> int:
        """The number of a sample that has as few tokens as any."""
        return int(np.argmin(self.lengths))

    def largest_id(self) -> int:
        """The largest token id among all samples of the folder; -1 where there is none."""
        return int(self.columns["ids"].max(initial=-1))

    @property
    def trained_weight(self) -> np.ndarray:
        """Sum of the token weights of each sample, [n] float64."""
        return self.column("trained_weight")

    @property
    def trained_tokens(self) -> np.ndarray:
        """Tokens of each sample that have a weight, [n] int64."""
        return self.column("trained_tokens")

    @property
    def source_index(self) -> np.ndarray:
        """Which entry of `source_weights` each sample belongs to, [n] int32."""
        return self.column("sources")

    @property
    def source_borders(self) -> np.ndarray:
        """Samples lie source by source: those of source s are the numbers from borders[s] to borders[s + 1]."""
        # Of the column's own type: of another, all of the column would be converted.
        return np.searchsorted(self.source_index, np.arange(len(self.source_weights) + 1, dtype=np.int32))

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of everything in the store: equal exactly where samples, order and weights are."""
        digest = hashlib.sha256(f"{self.base_fingerprint} {self.source_weights}".encode())
        if self.selected is not None:
            digest.update(np.ascontiguousarray(self.selected).data)
        return digest.hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any], mode: Literal["r", "r+"] = "r") -> np.ndarray:
    shape: tuple[int, ...] = dtype.shape
    item = dtype.base
    count = path.stat().st_size // item.itemsize
    if not count:  # An empty file cannot be mapped.
        return np.empty((0, *shape), item)
    mapped = np.memmap(path, item, mode=mode, shape=(count // (shape[0] if shape else 1), *shape))
    return mapped.view(np.ndarray)
