"""Folders that are whole or not there: written aside, checksummed, then renamed into place.

Order: write into a temporary folder, fsync every file, write manifest.json with the size and sha256 of each, fsync the
folder, rename, fsync the parent. A reader that checks the manifest can tell a whole folder from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


@contextmanager
def write_whole(folder: Path, facts: dict[str, Any] | None = None, replace: bool = False) -> Iterator[Path]:
    """Hand out a temporary folder; on a clean exit it becomes `folder`, with a manifest that also holds `facts`.

    On an exception the temporary folder is removed and `folder` is as it was. With `replace` an existing `folder` gives
    way only after the new one is complete; without, it raises FileExistsError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _seal(aside, facts or {})
        _move_into_place(aside, folder, replace)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _move_into_place(aside: Path, folder: Path, replace: bool) -> None:
    if not folder.exists():
        aside.rename(folder)
        return
    if not replace:
        raise FileExistsError(f"{folder} exists already")
    old = folder.parent / f".old-{folder.name}"
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {}
    for path in files:
        listed[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _sync_file(path)
    write_json(folder / MANIFEST, {"version": MANIFEST_VERSION, **facts, "files": listed})
    sync_folder(folder)


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises FileNotFoundError or ValueError where there is none that can be read."""
    read = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(read, dict) or not isinstance(read.get("files"), dict):
        raise ValueError(f"{folder / MANIFEST} is not a manifest")
    return read


def damage(folder: Path) -> list[str]:
    """What is wrong with `folder`, file by file; [] where every file has the size and sha256 of the manifest."""
    try:
        files = manifest(folder)["files"]
    except FileNotFoundError:
        return [f"{folder / MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    return [line for name, wanted in files.items() if (line := _damage_of(folder / name, wanted))]


def _damage_of(path: Path, wanted: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path} has {size:,} bytes, not {wanted['bytes']:,}"
        return None if sha256(path) == wanted["sha256"] else f"{path} has changed since it was written (sha256 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, KeyError, TypeError) as error:
        return f"{path} cannot be checked: {error}"


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` is either as before or complete: aside, fsync, rename."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write `content` so that `path` is either as before or complete: aside, fsync, rename."""
    aside = path.with_name(f".tmp-{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
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
