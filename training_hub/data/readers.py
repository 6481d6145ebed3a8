"""Readers: one per kind of file, each a stream of numbered rows in constant memory.

A row comes as a dictionary, as the bytes of one JSON line (decoded later, where rows are tokenised in parallel), or
as `Broken`: the place and reason it cannot be read. Readers go on after a broken row where the file allows it, so
that all problems are found in one pass.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from training_hub.data.files import BYTE_ORDER_MARK, DAMAGED, DataFile, Swollen, open_bytes
from training_hub.data.parquet import parquet_rows, without_null_fields
from training_hub.types import Origin

BLOCK_BYTES = 1 << 20
MOST_DIGITS = 64
# A line this many times too long is not looked through for its end: a small gzip file can unpack to terabytes.
TIMES_TOO_LONG = 16


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read; `problem` is the whole line to show, with file, line and column.

    is_end: nothing of the file behind it could be read either, so that leaving it out would lose more than one row.
    """

    problem: str
    is_end: bool = False


WHITE_SPACE = re.compile(r"[ \t\r\n]*")
RawRow = dict[str, Any] | bytes | Broken
Reader = Callable[[DataFile, "Counter[str]"], Iterator[tuple[int, RawRow]]]


class _NotJson(ValueError):
    """What the JSON grammar of Python allows and rows must not: duplicate keys, NaN, numbers too large."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _NotJson(f"the key {twice!r} stands twice in one object, and only one of them could be kept")
    return row


def _no_constant(name: str) -> Any:
    raise _NotJson(f"{name} is not JSON; write null or a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NotJson(f"the number {text[:20]} is too large")
    return number


def _sensible(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _NotJson(f"the number {text[:20]}... has {len(text):,} digits, which is too large")
    return int(text)


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite, parse_int=_sensible
)


def decode(raw: RawRow, origin: Origin) -> dict[str, Any] | Broken:
    """The row as a dictionary; JSON is parsed strictly (UTF-8, no duplicate keys, no NaN, no lone surrogates)."""
    if not isinstance(raw, bytes):
        return raw
    place = str(origin)
    try:
        text = raw.decode("utf-8")
        # JSON allows \ud800 alone; no tokenizer does. Only a line with such an escape is worth the second look.
        row = DECODER.decode(text)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return Broken(_not_utf8(place, f"byte {error.start + 1} of the line", raw[error.start]))
    except UnicodeEncodeError:
        return Broken(f"{place}: a lone surrogate (\\ud800 to \\udfff without its partner) is not text.")
    except json.JSONDecodeError as error:
        return Broken(_broken_json(f"{place}, column {error.colno}", error, text))
    except RecursionError:
        return Broken(f"{place}: the JSON is nested too deep to be a row.")
    except ValueError as error:
        return Broken(f"{place}: {error}.")
    return row if isinstance(row, dict) else Broken(_not_a_row(place, row))


def _not_utf8(place: str, where: str, byte: int) -> str:
    return (
        f"{place}: {where} (0x{byte:02x}) is not UTF-8. Convert the file: iconv -f LATIN1 -t UTF-8 (or what it is in)."
    )


def _broken_json(place: str, error: json.JSONDecodeError, text: str) -> str:
    near = text[max(0, error.pos - 20) : error.pos + 20].strip("\r\n")
    if "\0" in near:
        return f"{place}: a NUL byte in the text; the file is damaged or not text."
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    end = len(text.rstrip().encode("utf-8"))
    hint = f" The text ends inside the value, after byte {end:,}: was the file cut short? Copy it again." if cut else ""
    return f"{place}: broken JSON: {error.msg}, near {near!r}.{hint}"


def _not_a_row(place: str, value: Any) -> str:
    return f"{place}: a row is an object {{...}} with named columns; found {type(value).__name__} {str(value)[:40]!r}."


def read_json_lines(file: DataFile, tally: Counter[str]) -> Iterator[tuple[int, RawRow]]:
    """One row per line, still as bytes; blank lines are counted in tally["blank_lines"]."""
    with open_bytes(file.path, file.compression) as stream:
        for number, line in _numbered_lines(stream, file):
            if isinstance(line, Broken) or line.strip():
                yield number, line
            else:
                tally["blank_lines"] += 1


def _numbered_lines(stream: BinaryIO, file: DataFile) -> Iterator[tuple[int, bytes | Broken]]:
    number = 0
    try:
        while line := stream.readline(file.longest_row + 1):
            number += 1
            if len(line) > file.longest_row:
                ended = line.endswith(b"\n") or _skip_line(stream, file.longest_row)
                yield number, Broken(_too_long(f"{file.name} line {number}", file), is_end=not ended)
                if not ended:
                    return
            else:
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except DAMAGED as error:
        yield number + 1, Broken(_damaged(file, f"after line {number}", error), is_end=True)


def _skip_line(stream: BinaryIO, longest: int) -> bool:
    """Read on to the end of a line that is too long, a block at a time; False where it goes on and on."""
    skipped = 0
    while block := stream.readline(BLOCK_BYTES):
        skipped += len(block)
        if block.endswith(b"\n"):
            return True
        if skipped > TIMES_TOO_LONG * longest:
            return False
    return True


def _too_long(place: str, file: DataFile) -> str:
    return f"{place}: longer than data.max_row_bytes {file.longest_row:,}. Is a line break missing? Else raise it."


def _damaged(file: DataFile, where: str, error: Exception) -> str:
    if isinstance(error, Swollen):
        return f"{file.name}: {error}."
    return f"{file.name}: the {file.compression} data is cut short or damaged {where} ({error}); copy it again."


def read_json_array(file: DataFile, tally: Counter[str]) -> Iterator[tuple[int, RawRow]]:
    """The objects of a JSON array, parsed one by one; rows are numbered from 1."""
    del tally
    with open_bytes(file.path, file.compression) as stream:
        array = _ArrayText(stream, file)
        row = 0
        try:
            array.expect_open()
            while array.next_begins():
                row += 1
                value = array.value()
                yield row, value if isinstance(value, dict) else Broken(_not_a_row(f"{file.name} row {row}", value))
        except _BadArray as error:
            yield row, Broken(str(error), is_end=True)
        except DAMAGED as error:
            yield row, Broken(_damaged(file, f"after row {row}", error), is_end=True)


class _BadArray(ValueError):
    """The whole line to show for an array that cannot be read further."""


class _ArrayText:
    """The text of a JSON array, held a block at a time; `text[at:]` is what is not yet consumed."""

    def __init__(self, stream: BinaryIO, file: DataFile):
        self._stream = stream
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes_read = 0
        self._lines_gone = 0
        self._columns_gone = 0
        self._text = ""
        self._at = 0
        self._ended = False
        self._is_first = True

    def expect_open(self) -> None:
        if self._peek() != "[":
            raise self._problem("an array [...] was expected")
        self._at += 1

    def next_begins(self) -> bool:
        """Step over the comma to the next value; False at the closing bracket, after which nothing may follow."""
        character = self._peek()
        if character == "]":
            self._at += 1
            if self._peek():
                raise self._problem("text after the end of the array")
            return False
        if not self._is_first:
            if character != ",":
                raise self._problem(
                    "',' or ']' expected" if character else "the file ends inside the array: cut short?"
                )
            self._at += 1
            if self._peek() == "]":
                raise self._problem("a value expected after ','")
        self._is_first = False
        return True

    def value(self) -> Any:
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                into_value = max(error.pos - self._at, 0)
                if len(self._text) - self._at > self._file.longest_row:
                    raise self._problem(f"a row longer than data.max_row_bytes {self._file.longest_row:,}") from error
                if not self._may_go_on(error):
                    self._at += into_value
                    raise self._problem(f"broken JSON: {error.msg}") from error
            except _NotJson as error:
                raise self._problem(str(error)) from error
            except RecursionError as error:
                raise self._problem("the JSON is nested too deep to be a row") from error
            else:
                # A number at the end of the block may go on in the next one; an object ends where it ends.
                if end < len(self._text) or isinstance(value, dict | list) or not self._fill():
                    self._at = end
                    return value

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the value is only cut by the end of the block; then more is read, twice as much each time."""
        is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
        return is_cut and self._fill()

    def _peek(self) -> str:
        while True:
            self._at = WHITE_SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def _fill(self) -> bool:
        """Forget what is consumed and read at least as much as is left; False at the end of the file."""
        if self._ended:
            return False
        gone = self._text[: self._at]
        newlines = gone.count("\n")
        self._lines_gone += newlines
        self._columns_gone = len(gone) - gone.rfind("\n") - 1 if newlines else self._columns_gone + len(gone)
        rest = self._text[self._at :]
        block = self._stream.read(max(BLOCK_BYTES, len(rest)))
        self._ended = not block
        self._text = rest + self._as_text(block, rest)
        self._at = 0
        return not self._ended

    def _as_text(self, block: bytes, rest: str) -> str:
        pending = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = self._bytes_read - len(pending) + error.start
            line = self._lines_gone + rest.count("\n") + error.object[: error.start].count(b"\n") + 1
            byte = error.object[error.start]
            place = f"{self._file.name} line {line}"
            raise _BadArray(_not_utf8(place, f"byte {where + 1} of the file", byte)) from error
        self._bytes_read += len(block)
        return text

    def _problem(self, reason: str) -> _BadArray:
        before = self._text[: self._at]
        newlines = before.count("\n")
        line = self._lines_gone + newlines + 1
        column = len(before) - before.rfind("\n") if newlines else self._columns_gone + len(before) + 1
        near = self._text[max(0, self._at - 20) : self._at + 20]
        return _BadArray(f"{self._file.name} line {line}, column {column}: {reason}, near {near!r}.")


def read_csv(file: DataFile, tally: Counter[str]) -> Iterator[tuple[int, RawRow]]:
    """Rows by the names in the header; a row is numbered by the line on which it begins.

    The delimiter is a comma, or a tab or semicolon where the header has one and no comma. All values are text.
    """
    # csv refuses fields above 128 KiB by default, which a document easily is; the limit is one number per process.
    csv.field_size_limit(max(csv.field_size_limit(), file.longest_row))
    with open_bytes(file.path, file.compression) as stream:
        try:
            lines = _text_lines(stream, file)
            header_line = next(lines, "")
            delimiter = "," if "," in header_line else next((mark for mark in "\t;" if mark in header_line), ",")
            header = next(csv.reader([header_line], delimiter=delimiter), [])
            yield from _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True), header, file, tally)
        except _BadText as error:
            yield error.line, Broken(str(error), is_end=True)


class _BadText(ValueError):
    """A line that is not UTF-8, or compressed data that ends: the whole problem line, and the line's number."""

    def __init__(self, problem: str, line: int):
        super().__init__(problem)
        self.line = line


def _text_lines(stream: BinaryIO, file: DataFile) -> Iterator[str]:
    for number, line in _numbered_lines(stream, file):
        if isinstance(line, Broken):
            raise _BadText(line.problem, number)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {error.start + 1} of the line"
            raise _BadText(_not_utf8(f"{file.name} line {number}", where, line[error.start]), number) from error


def _csv_rows(rows: Any, header: list[str], file: DataFile, tally: Counter[str]) -> Iterator[tuple[int, RawRow]]:
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        yield 1, Broken(f"{file.name} line 1: the column {twice[0]!r} stands twice in the header.", is_end=True)
        return
    while True:
        begins = rows.line_num + 2  # The header is line 1, and this row begins on the line after the last one.
        try:
            values = next(rows, None)
        except csv.Error as error:
            yield begins, Broken(f"{file.name} line {begins}: broken CSV: {error}.", is_end=True)
            return
        if values is None:
            return
        if not values:
            tally["blank_lines"] += 1
        elif len(values) != len(header):
            found = f"{len(values)} values, but the header names {len(header)} columns"
            yield (
                begins,
                Broken(f"{file.name} line {begins}: {found} ({', '.join(header)}). Put text with commas in quotes."),
            )
        else:
            yield begins, dict(zip(header, values, strict=True))


def read_parquet(file: DataFile, tally: Counter[str]) -> Iterator[tuple[int, RawRow]]:
    """Rows of a Parquet file, numbered from 1; null fields of nested structs are left out."""
    import pyarrow

    row = 0
    try:
        with _seekable(file) as stream:
            for value in parquet_rows(stream, file.path.stat().st_size):
                row += 1
                yield row, without_null_fields(value, tally)
    except Swollen as error:
        yield row + 1, Broken(_damaged(file, "", error), is_end=True)
    except (pyarrow.ArrowException, OSError, *DAMAGED) as error:
        damaged = f"{file.name}: the Parquet data is damaged after row {row} ({error}); copy it again."
        yield row + 1, Broken(damaged, is_end=True)


@contextmanager
def _seekable(file: DataFile) -> Iterator[Any]:
    """The file itself, or its unpacked bytes, laid on disk for as long as needed: Parquet is read from its end."""
    if file.compression is None:
        with file.path.open("rb") as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_bytes(file.path, file.compression) as stream:
            shutil.copyfileobj(stream, unpacked)
        unpacked.seek(0)
        yield unpacked


def read_text(file: DataFile, tally: Counter[str]) -> Iterator[tuple[int, RawRow]]:
    """The whole file as one row, {"text": ...}: a plain text file is one document."""
    del tally
    try:
        with open_bytes(file.path, file.compression) as stream:
            content = stream.read(file.longest_row + 1).removeprefix(BYTE_ORDER_MARK)
        if len(content) > file.longest_row:
            size = f"data.max_row_bytes {file.longest_row:,}"
            yield 1, Broken(f"{file.name}: a text file is one document, and this one is longer than {size}; split it.")
        elif content.strip():
            yield 1, {"text": content.decode("utf-8").replace("\r\n", "\n")}
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = f"byte {error.start + 1} of the file"
        yield 1, Broken(_not_utf8(f"{file.name} line {line}", where, content[error.start]))
    except DAMAGED as error:
        yield 1, Broken(_damaged(file, "", error))


READERS: Mapping[str, Reader] = {
    "jsonl": read_json_lines,
    "json": read_json_array,
    "csv": read_csv,
    "parquet": read_parquet,
    "text": read_text,
}
