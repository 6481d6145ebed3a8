"""Sources: what `data.path` or a caller names, opened as a stream of (Origin, row).

A source is one entry of `data.path` (a file, folder, glob or hub name) or one object handed over (DataFrame,
`datasets` object, iterable of dictionaries). Nothing is held: rows pass by, and memory stays constant.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training_hub.data.files import LONGEST_ROW_BYTES, DataFile, find_files, hint_near, kind_by_name, recognise
from training_hub.data.parquet import without_null_fields
from training_hub.data.readers import READERS, Broken, RawRow
from training_hub.errors import DataError, RecipeError
from training_hub.folders import sha256
from training_hub.recipe.sections import Data, DataSource
from training_hub.types import Console, Origin

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?(\[\w+\])?")

Rows = Iterator[tuple[Origin, RawRow]]


@dataclass(frozen=True)
class Part:
    """One stream of a source: a file, or an object handed over.

    `rows(tally)` opens it anew; `fingerprint(console)` is a hash of its contents, shown as slow work, and None where it
    can be read only once.
    `num_rows` is None where it is not known; `num_bytes` is the size of an uncompressed file of JSON lines; `unit` is
    what is counted. `changed()` is the problem line of a file that is no longer what it was when it was opened.
    """

    name: str
    rows: Callable[[Counter[str]], Rows]
    fingerprint: Callable[[Console], str | None]
    num_rows: int | None = None
    num_bytes: int | None = None
    unit: str = "row"
    changed: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Source:
    """One entry of the data: its parts in order, how often its rows are seen, and the format it is said to have.

    `notes` are lines to say aloud: which files of a folder are used, what a file holds other than its name says.
    """

    name: str
    parts: tuple[Part, ...]
    weight: float = 1.0
    format: str = "auto"
    notes: tuple[str, ...] = ()


def open_sources(data: Data) -> list[Source]:
    """The sources of `data.path`. Raises DataError listing all that cannot be found or recognised."""
    if data.path is None:
        raise RecipeError("data.path: nothing to train on; name a file, folder, glob or hub name.")
    entries = data.path if isinstance(data.path, list) else [data.path]
    sources, problems = [], []
    for entry in entries:
        try:
            sources.append(_open_entry(entry, data))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return sources


def _open_entry(entry: str | DataSource, data: Data) -> Source:
    named = entry if isinstance(entry, DataSource) else DataSource(path=entry)
    source = open_path(named.path, named.split or data.split, data.max_row_bytes, data.streaming)
    return Source(source.name, source.parts, named.weight, named.format or data.format, source.notes)


def open_path(
    named: str, split: str = "train", longest_row: int = LONGEST_ROW_BYTES, streaming: bool = False
) -> Source:
    """The source that one path or hub name stands for. Raises DataError for what is not there or cannot be read.

    streaming: a hub data set passes by row by row and is not downloaded whole.
    """
    try:
        return _open_path(named, split, longest_row, streaming)
    except OSError as error:
        raise DataError(f"{named}: cannot be read: {error.strerror or error}.") from error


def _open_path(named: str, split: str, longest_row: int, streaming: bool) -> Source:
    path = Path(named).expanduser()
    if path.is_dir() and any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        return _saved_dataset(path, named, split)
    if not path.exists() and _looks_like_hub_name(path, named):
        return _from_hub(named, split, streaming)
    paths, note = find_files(named)
    files, problems = [], []
    for found in paths:
        try:
            files.append(recognise(found, str(found), longest_row))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    notes = [line for line in (note, *(file.note for file in files), *map(_document_note, files)) if line]
    return Source(named, tuple(_file_part(file) for file in files), notes=tuple(notes))


def _document_note(file: DataFile) -> str | None:
    return f"{file.name}: plain text, the whole file is one document" if file.kind == "text" else None


def _looks_like_hub_name(path: Path, named: str) -> bool:
    return bool(HUB_NAME.fullmatch(named)) and kind_by_name(path) is None and not path.parent.exists()


def _file_part(file: DataFile) -> Part:
    # In an array and in Parquet lines mean nothing; what a reader counts there are rows.
    unit = "row" if file.kind in ("json", "parquet") else "line"

    def rows(tally: Counter[str]) -> Rows:
        for number, row in READERS[file.kind](file, tally):
            yield Origin(file.name, number, unit), row

    num_bytes = file.path.stat().st_size if file.kind == "jsonl" and not file.compression else None
    before = _state(file.path)

    def changed() -> str | None:
        if _state(file.path) == before:
            return None
        return f"{file.name}: the file changed while it was read. Wait until it is written, and run again."

    return Part(
        file.name, rows, lambda console: _sum_of(file, console), _rows_of_parquet(file), num_bytes, unit, changed
    )


def _sum_of(file: DataFile, console: Console) -> str:
    with console.progress(f"recognising {file.name}", file.path.stat().st_size / 1e6, "MB") as advance:
        return sha256(file.path, lambda count: advance(count / 1e6))


def _state(path: Path) -> tuple[int, ...] | None:
    """What tells whether a file is still the same: its place, size and time of change; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _rows_of_parquet(file: DataFile) -> int | None:
    if file.kind != "parquet" or file.compression:
        return None
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_metadata(file.path).num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.name}: the Parquet file is damaged ({error}); copy it again.") from error


def _datasets_package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("datasets is not installed: pip install 'training-hub[datasets]'.") from error
    return datasets


def _from_hub(named: str, split: str, streaming: bool) -> Source:
    """A data set on the Hugging Face hub, downloaded or as a stream: `org/name`, or `org/name:configuration[split]`."""
    try:
        package = _datasets_package()
    except DataError as error:
        raise DataError(f"{_not_here(named)} To look for it on the hub, {error}") from error
    if named.endswith("]"):
        named, _, split = named.removesuffix("]").partition("[")
    name, _, configuration = named.partition(":")
    try:
        loaded = package.load_dataset(name, configuration or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise DataError(
            f"{_not_here(name)} Taken as the name of a data set on the hub, it has no split {split!r} that can be "
            f"had: {first_line} (a configuration and a split are named as org/name:configuration[split])"
        ) from error
    part = _dataset_part(loaded, f"{named}[{split}]")
    return _one_part(replace(part, fingerprint=lambda console: _commit_on_hub(name)) if streaming else part)


def _commit_on_hub(name: str) -> str | None:
    """The commit of a data set on the hub, by which rows that passed by are known again; None where it is not told."""
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return dataset_info(name).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None


def _not_here(named: str) -> str:
    return f"{named}: there is no such file or folder here.{hint_near(Path(named))}"


def _saved_dataset(path: Path, named: str, split: str) -> Source:
    loaded = _datasets_package().load_from_disk(str(path))
    return open_object(loaded, named, split)


def open_object(rows: Any, name: str = "rows", split: str = "train") -> Source:
    """The source that a live object is: DataFrame, `datasets` object, Arrow table, path or iterable of dictionaries."""
    if isinstance(rows, str | Path):
        return open_path(str(rows), split)
    package = type(rows).__module__.partition(".")[0]
    if package == "datasets":
        return _one_part(_dataset_part(_chosen_split(rows, name, split), name))
    if package == "pandas":
        return _one_part(_frame_part(rows, name))
    if package == "polars":
        return _one_part(_repeatable_part(lambda: rows.iter_rows(named=True), len(rows), name))
    if package == "pyarrow":
        return _one_part(_repeatable_part(lambda: _table_rows(rows), len(rows), name, is_arrow=True))
    if isinstance(rows, Mapping):
        raise DataError(f"{name}: a dictionary is one row; hand over a list of them.")
    if isinstance(rows, list | tuple):
        if rows and all(isinstance(entry, str | Path) for entry in rows):
            opened = [open_path(str(entry), split) for entry in rows]
            notes = tuple(note for source in opened for note in source.notes)
            return Source(name, tuple(part for source in opened for part in source.parts), notes=notes)
        return _one_part(_repeatable_part(lambda: rows, len(rows), name))
    if isinstance(rows, Iterable):
        return _one_part(Part(name, lambda tally: _numbered(rows, name), lambda console: None))
    raise DataError(
        f"{name}: {type(rows).__name__} cannot be read; hand over a DataFrame, a `datasets` object or a list."
    )


def _one_part(part: Part) -> Source:
    return Source(part.name, (part,))


def _chosen_split(rows: Any, name: str, split: str) -> Any:
    if not isinstance(rows, Mapping):
        return rows
    if split not in rows:
        raise DataError(f"{name}: no split {split!r}; it has {', '.join(map(str, rows))}. Set data.split.")
    return rows[split]


def _dataset_part(dataset: Any, name: str) -> Part:
    if hasattr(dataset, "__len__"):
        return _repeatable_part(lambda: dataset, len(dataset), name, is_arrow=True)
    return Part(name, lambda tally: _numbered(dataset, name, tally), lambda console: None)


def _table_rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _repeatable_part(again: Callable[[], Iterable[Any]], num_rows: int, name: str, is_arrow: bool = False) -> Part:
    def rows(tally: Counter[str]) -> Rows:
        return _numbered(again(), name, tally if is_arrow else None)

    def fingerprint(console: Console) -> str:
        with console.progress(f"recognising {name}", num_rows) as advance:
            return _hash_of_rows(again(), advance)

    return Part(name, rows, fingerprint, num_rows)


def _frame_part(frame: Any, name: str) -> Part:
    columns = [str(column) for column in frame.columns]

    def again() -> Iterator[dict[str, Any]]:
        for values in frame.itertuples(index=False, name=None):
            # A DataFrame has no absent value but NaN; as a cell of the row it is left out, as JSON would.
            yield {name: value for name, value in zip(columns, values, strict=True) if not _is_missing(value)}

    return _repeatable_part(again, len(frame), name)


def _is_missing(value: Any) -> bool:
    return (
        value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def plain(value: Any) -> Any:
    """`value` with arrays, tensors and their numbers made lists and Python numbers."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        # A list of numbers stays as it is: looking at each of a tokenised row would take longer than all else.
        return value if value and type(value[0]) in (int, float) else [plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def _numbered(rows: Iterable[Any], name: str, arrow_tally: Counter[str] | None = None) -> Rows:
    for number, row in enumerate(rows, start=1):
        origin = Origin(name, number, "row")
        if not isinstance(row, Mapping):
            found = f"{type(row).__name__} {str(row)[:40]!r}"
            yield origin, Broken(f"{origin}: a row is a dictionary with named columns; found {found}.")
        elif arrow_tally is not None:
            yield origin, without_null_fields(plain(row), arrow_tally)
        else:
            yield origin, plain(row)


def _hash_of_rows(rows: Iterable[Any], advance: Callable[[float], None]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(plain(row), default=repr).encode())
        digest.update(b"\n")
        advance(1)
    return digest.hexdigest()
