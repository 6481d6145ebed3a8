"""Files that hold rows: found by path, folder or glob, recognised by their first bytes, opened decompressed.

The extension only decides where the bytes do not: a Parquet file called `.jsonl` is read as Parquet, and that is said.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from training_hub.errors import DataError
from training_hub.folders import near

KIND_OF_EXTENSION = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSED_EXTENSIONS = (".gz", ".zst", ".zstd")
WHAT_IS_READ = "jsonl, json, csv, tsv, parquet and txt files, each also as .gz or .zst"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_ROW_BYTES = 64 << 20
# What packed bytes may become: rows of text become 3 to 20 times as many, and bombs 1,000 (gzip) and more.
MOST_TIMES = 250
UNPACKED_FREELY = 64 << 20
# zstd makes at most 128 KiB of four bytes, so that a piece of this size never becomes more than 64 MiB.
PACKED_PIECE = 2 << 10
# What gzip may have read and not yet unpacked.
READ_AHEAD = 128 << 10
# Errors that reading compressed bytes raises when a file is cut short or damaged.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


class Swollen(EOFError):
    """Packed bytes become so many that they may have no end."""

    def __init__(self) -> None:
        super().__init__(
            f"unpacks to more than {UNPACKED_FREELY >> 20} MiB and {MOST_TIMES} times its size, as what is made to "
            "fill a machine does; if it is meant so, unpack it and name the result"
        )


@dataclass(frozen=True)
class DataFile:
    """A file that can be read: `kind` is jsonl, json, csv, parquet or text; `note` says what differs from its name.

    A row of more than `longest_row` bytes is not read.
    """

    path: Path
    name: str
    kind: str
    compression: str | None = None
    note: str | None = None
    longest_row: int = LONGEST_ROW_BYTES


def find_files(named: str) -> tuple[list[Path], str | None]:
    """The files that `named` (a file, folder or glob) stands for, sorted, and a line to say where a choice was made.

    Raises DataError with the nearest names where there is nothing.
    """
    path = Path(named).expanduser()
    if path.is_dir():
        return _files_of_folder(path, named)
    if path.exists():
        return [path], None
    if glob.has_magic(named):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not found:
            raise DataError(f"{named}: no file matches.")
        return found, f"{named}: {len(found)} files"
    raise DataError(_missing(path, named))


def _files_of_folder(folder: Path, named: str) -> tuple[list[Path], str]:
    inside = sorted(
        entry
        for entry in folder.rglob("*")
        if entry.is_file() and not any(part.startswith(".") for part in entry.relative_to(folder).parts)
    )
    usable = [entry for entry in inside if kind_by_name(entry)]
    # A README.txt or LICENSE.txt beside the data is no data: text files count only where nothing else does.
    usable = [entry for entry in usable if kind_by_name(entry) != "text"] or usable
    if not usable:
        seen = ", ".join(entry.name for entry in inside[:5]) or "nothing"
        raise DataError(f"{named}: the folder holds no {WHAT_IS_READ}; found {seen}.")
    rest = len(inside) - len(usable)
    left_out = f", {rest} other files left out" if rest else ""
    shown = ", ".join(str(entry.relative_to(folder)) for entry in usable[:4]) + (", ..." if len(usable) > 4 else "")
    return usable, f"{named}: folder with {len(usable)} data files ({shown}){left_out}"


def _missing(path: Path, named: str) -> str:
    parent = path.parent
    if path.is_symlink():
        return f"{named} is a symbolic link that leads nowhere, or in a circle (to {path.readlink()})."
    if not parent.is_dir():
        return f"{named} does not exist (nor does the folder {parent}).{hint_near(path)}"
    return f"{named} does not exist.{hint_near(path)}"


def hint_near(path: Path) -> str:
    """A sentence with the nearest names that exist, empty where there are none."""
    found = near(path)
    return f" Near it: {', '.join(map(str, found))}." if found else ""


def kind_by_name(path: Path) -> str | None:
    """jsonl, json, csv, parquet or text by the extension, None where it says nothing."""
    return KIND_OF_EXTENSION.get(_data_extension(path))


def _data_extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_EXTENSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def recognise(path: Path, name: str | None = None, longest_row: int = LONGEST_ROW_BYTES) -> DataFile:
    """What `path` holds, from its first bytes. Raises DataError, saying what was found, where that is no data."""
    name = name or str(path)
    magic = _first_bytes(path, name)
    compression = "gzip" if magic[:2] == b"\x1f\x8b" else "zstd" if magic == b"\x28\xb5\x2f\xfd" else None
    try:
        with open_bytes(path, compression) as stream:
            head = stream.read(1 << 16)
            _look_ahead(stream)
    except Swollen as error:
        raise DataError(f"{name}: {error}.") from error
    except DAMAGED as error:
        raise DataError(f"{name}: the {compression} data is cut short or damaged ({error}); copy it again.") from error
    _refuse_foreign(head, name)
    kind, note = _kind_of_head(head, path, name)
    return DataFile(path, name, kind, compression, note, longest_row)


def _first_bytes(path: Path, name: str) -> bytes:
    """The first four bytes. Raises DataError, before it is opened, for what is no ordinary file: a pipe would wait."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name}: not an ordinary file ({stat.filemode(status.st_mode)}).")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}.") from error
    try:
        with path.open("rb") as raw:
            return raw.read(4)
    except OSError as error:
        whose = f"mode {stat.filemode(status.st_mode)}, owner {_user(status.st_uid)}"
        raise DataError(f"{name}: cannot be read: {error.strerror} ({whose}).") from error


def _user(number: int) -> str:
    """The name of a user, or the number where the system knows no name."""
    try:
        import pwd  # not on Windows

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return str(number)


def _refuse_foreign(head: bytes, name: str) -> None:
    start = head.lstrip()[:64].lower()
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name} > converted.jsonl")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{name}: this is a Git LFS pointer, not the data; run `git lfs pull`.")
    if start.startswith((b"<!doctype", b"<html")):
        raise DataError(f"{name}: this is an HTML page, not data; the download went wrong.")
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"{name}: a zip archive; unpack it and name the files in it.")
    if head.startswith(b"ARROW1"):
        raise DataError(f"{name}: an Arrow file; save it as Parquet, or name the folder that `save_to_disk` wrote.")


def _kind_of_head(head: bytes, path: Path, name: str) -> tuple[str, str | None]:
    by_name = kind_by_name(path)
    if head.startswith(b"PAR1"):
        return "parquet", None if by_name == "parquet" else f"{name}: holds Parquet, and is read as such"
    if by_name == "text":
        return "text", None
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not text:
        raise DataError(f"{name}: 0 rows; the file is empty.")
    if by_name == "parquet":
        raise DataError(f"{name}: not a Parquet file; it begins with {head[:8]!r}.")
    if text.startswith(b"["):
        return "json", None if by_name == "json" else f"{name}: holds a JSON array, and is read as such"
    if text.startswith(b"{"):
        _refuse_single_object(text, len(head) == 1 << 16, name)
        return "jsonl", None if by_name == "jsonl" else f"{name}: holds JSON lines, and is read as such"
    if by_name is None:
        raise DataError(f"{name}: not recognised; what is read: {WHAT_IS_READ}. It begins with {text[:16]!r}.")
    return ("csv" if by_name == "csv" else "jsonl"), None


def _refuse_single_object(text: bytes, is_longer: bool, name: str) -> None:
    """A JSON object over several lines is one row at most, and hardly ever meant as one."""
    first_line = text.split(b"\n", 1)[0]
    if first_line.rstrip().endswith(b"}") or (is_longer and first_line == text):
        return
    lists = []
    try:
        whole: Any = {} if is_longer else json.loads(text)
        lists = [
            key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
    except ValueError:
        # Broken as one object: its first line may be broken JSON Lines, which the reader reports with its column.
        if first_line.rstrip() != b"{":
            return
    hint = f" Its list {lists[0]!r} looks like the rows: save that list alone." if lists else ""
    raise DataError(
        f"{name}: one JSON object over several lines; an array of rows, or one row per line, is wanted.{hint}"
    )


def open_bytes(path: Path, compression: str | None) -> BinaryIO:
    """The decompressed bytes of a file; reading raises Swollen where they are far too many.

    Raises DataError where zstandard is needed and not installed.
    """
    file = path.open("rb")
    if compression is None:
        return file
    unpacked: Any = gzip.GzipFile(fileobj=file) if compression == "gzip" else _ZstandardStream(file, path)
    return io.BufferedReader(_Limited(file, unpacked), buffer_size=1 << 20)


class _Limited(io.RawIOBase):
    """The bytes of `unpacked`, which reads `file`; Swollen where they are too many for what was read."""

    def __init__(self, file: BinaryIO, unpacked: Any):
        self._file = file
        self._unpacked = unpacked
        # One read at a time: what stands before the place where a gzip file is cut short is handed out first.
        self._read = getattr(unpacked, "readinto1", unpacked.readinto)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._read(buffer)
        self._count += count
        if self._count > max(UNPACKED_FREELY, MOST_TIMES * self._file.tell()):
            raise Swollen
        return count

    def is_dense(self) -> bool:
        """Whether more than MOST_TIMES may have come out of what went in so far."""
        return self._count > MOST_TIMES * max(0, self._file.tell() - READ_AHEAD)

    def close(self) -> None:
        self._unpacked.close()
        self._file.close()
        super().close()


def _look_ahead(stream: BinaryIO) -> None:
    """Unpack until it is an ordinary file or Swollen is raised: rows of a bomb would take minutes to get as far."""
    raw = getattr(stream, "raw", None)
    try:
        while isinstance(raw, _Limited) and raw.is_dense() and stream.read(1 << 20):
            pass
    except Swollen:
        raise
    except DAMAGED:
        return  # the reader comes to the same place, and knows which row it is


class _ZstandardStream(io.RawIOBase):
    """Decompressed bytes of a zstd file of any number of frames; EOFError where the last one is cut short.

    zstandard's own stream reader ends without a word on a cut file (0.25), which would lose rows silently.
    """

    def __init__(self, file: BinaryIO, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: zstd needs a package: pip install 'training-hub[zstd]'.") from error
        self._package: Any = zstandard
        self._file = file
        self._frame: Any = self._new_frame()
        self._ready = memoryview(b"")

    def _new_frame(self) -> Any:
        return self._package.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._frame.unused_data if self._frame.eof else b""
            compressed = compressed or self._file.read(PACKED_PIECE)
            if not compressed:
                return self._end()
            if self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._package.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _end(self) -> int:
        if not self._frame.eof:
            raise EOFError("the last zstd frame is not complete")
        return 0
