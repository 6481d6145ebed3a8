"""Folders that are whole or not there: written aside, checksummed, then renamed into place.

Order: write into a temporary folder, fsync every file, write manifest.json with the size and sha256 of each, fsync the
folder, rename, fsync the parent. A reader that checks the manifest can tell a whole folder from a damaged one: the
manifest carries its own sha256, too. What a killed process leaves has a name that begins with a dot; `tidy` removes it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
TEMPORARY, REPLACED = ".tmp-", ".old-"


@contextmanager
def write_whole(
    folder: Path,
    facts: dict[str, Any] | None = None,
    replace: bool = False,
    known: Mapping[str, FileFacts] | None = None,
) -> Iterator[Path]:
    """Hand out a temporary folder; on a clean exit it becomes `folder`, with a manifest that also holds `facts`.

    known: what the manifest says of files that others wrote into it, flushed and hashed; looked up at the end.
    On an exception the temporary folder is removed and `folder` is as it was. With `replace` an existing `folder` gives
    way only after the new one is complete; without, it raises FileExistsError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f"{TEMPORARY}{folder.name}"
    _clear(aside)
    aside.mkdir()
    try:
        yield aside
        _seal(aside, facts or {}, known or {})
        _move_into_place(aside, folder, replace)
    except BaseException:
        _clear(aside)
        raise
    sync_folder(folder.parent)


def _move_into_place(aside: Path, folder: Path, replace: bool) -> None:
    if not folder.exists():
        aside.rename(folder)
        return
    if not replace:
        raise FileExistsError(f"{folder} exists already")
    old = folder.parent / f"{REPLACED}{folder.name}"
    _clear(old)
    folder.rename(old)
    try:
        aside.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _clear(old)


def tidy(parent: Path) -> None:
    """Clear `parent` of what a killed process left: unfinished folders and files, and folders on their way out.

    A folder that had made way for another, which then never came, gets its name back.
    """
    if not parent.is_dir():
        return
    for path in list(parent.iterdir()):
        if path.name.startswith(REPLACED):
            name = parent / path.name.removeprefix(REPLACED)
            if name.exists():
                _clear(path)
            else:
                path.rename(name)
        elif path.name.startswith(TEMPORARY):
            _clear(path)


def remove(folder: Path) -> None:
    """Remove `folder` so that a reader sees it whole or not at all, even if this process is killed meanwhile."""
    gone = folder.parent / f"{TEMPORARY}gone-{folder.name}"
    _clear(gone)
    folder.rename(gone)
    _clear(gone)


def _clear(path: Path) -> None:
    # A link goes by itself: what it leads to is somebody else's.
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def facts_of_file(path: Path) -> FileFacts:
    """What a manifest says of this file, which is flushed to the disk."""
    found = FileFacts(path.stat().st_size, sha256(path))
    _sync_file(path)
    return found


def _seal(folder: Path, facts: dict[str, Any], known: Mapping[str, FileFacts]) -> None:
    listed = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        listed[name] = asdict(known.get(name) or facts_of_file(path))
    content = {"version": MANIFEST_VERSION, **facts, "files": listed}
    write_json(folder / MANIFEST, {**content, "sha256": _sum_of(content)})
    sync_folder(folder)


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(_as_text(content).encode("utf-8")).hexdigest()


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises FileNotFoundError or ValueError where there is none as it was written."""
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    read = json.loads(text)
    if not isinstance(read, dict) or not isinstance(read.get("files"), dict):
        raise ValueError(f"{folder / MANIFEST} is not a manifest")
    content = {key: value for key, value in read.items() if key != "sha256"}
    if read.get("sha256") != _sum_of(content) or text != _as_text(read):
        raise ValueError(f"{folder / MANIFEST} has changed since it was written (sha256 differs)")
    return read


def damage(folder: Path, advance: Callable[[float], None] = lambda count: None) -> list[str]:
    """What is wrong with `folder`, file by file; [] where every file has the size and sha256 of the manifest.

    advance: told of the bytes read.
    """
    try:
        files = manifest(folder)["files"]
    except FileNotFoundError:
        return [f"{folder / MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    return [line for name, wanted in files.items() if (line := _damage_of(folder / name, wanted, advance))]


def _damage_of(path: Path, wanted: dict[str, Any], advance: Callable[[float], None]) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path} has {size:,} bytes, not {wanted['bytes']:,}"
        if sha256(path, advance) == wanted["sha256"]:
            return None
        return f"{path} has changed since it was written (sha256 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, KeyError, TypeError) as error:
        return f"{path} cannot be checked: {error}"


def sha256(path: Path, advance: Callable[[float], None] = lambda count: None) -> str:
    """The sha256 of a file's bytes, in hexadecimal; `advance` is told of each block's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` is either as before or complete: aside, fsync, rename."""
    write_text(path, _as_text(content))


def _as_text(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, content: str) -> None:
    """Write `content` so that `path` is either as before or complete: aside, fsync, rename."""
    aside = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def near(path: Path, most: int = 3) -> list[Path]:
    """What exists under names like those of `path`, which does not: dta/chat finds data/chat.jsonl; [] for nothing."""
    base = next((parent for parent in path.parents if parent.is_dir()), None)
    if base is None:
        return []
    found = [base]
    for name in path.relative_to(base).parts:
        alike = [folder / each for folder in found for each in _alike(folder, name)]
        if not alike:
            break
        found = alike[:most]
    return [] if found == [base] else found


def _alike(folder: Path, name: str) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:  # a file, or a folder that may not be read: then there is nothing to propose
        return []
    if name in names:
        return [name]
    same_stem = [each for each in names if each.partition(".")[0] == name]
    return [*same_stem, *(each for each in difflib.get_close_matches(name, names, 3, 0.5) if each not in same_stem)]
