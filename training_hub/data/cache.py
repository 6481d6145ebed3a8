"""Tokenised data kept on disk: one sealed folder per key, where the key is the hash of everything it was made from.

Two processes that want the same key do not make it twice: one makes it, the other waits and then finds it. Where they
take more room than they may, those not used for longest go, but none that a living process uses: each holds a lock on
`.use-KEY` beside its folder, whose time of change is that of the last use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from training_hub.data.store import TokenStore
from training_hub.folders import MANIFEST, damage, remove
from training_hub.types import Console

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KEY_LENGTH = 64


@dataclass(frozen=True)
class Cache:
    """A folder of kept stores, and how many bytes they may take."""

    root: Path
    most_bytes: float


def cache_folder(chosen: str | None) -> Path:
    """Where tokenised data is kept: `chosen`, or training_hub in the user's cache folder."""
    if chosen is not None:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "training_hub"


def key_of(made_from: dict[str, Any]) -> str:
    """The sha256 of a description of everything that decides the contents; our own code is added to it."""
    made_from = {**made_from, "code": _code()}
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()


def kept(
    cache: Cache | None,
    key: str | None,
    make: Callable[[Path], None],
    source_weights: Sequence[float],
    console: Console,
) -> TokenStore:
    """The store under `key`: found whole in the cache, else made now by `make(folder)`.

    A damaged one is said and made again. Without cache or key it is made in a temporary folder, which goes with the
    store.
    """
    if cache is None or key is None:
        aside = _ScratchFolder()
        make(aside.path / "store")
        return TokenStore.open(aside.path / "store", source_weights, keep_alive=aside)
    folder = cache.root / key[:2] / key
    with _only_one(folder):
        is_there = _is_whole(folder, console)
        if is_there:
            console.say(f"data: tokenised before, taken from {folder}")
        else:
            make(folder)
        use = _Use(folder)
    if not is_there:
        prune(cache, console)
    return TokenStore.open(folder, source_weights, keep_alive=use)


def kept_in_parts(cache: Cache | None, key: str, make: Callable[[Path], None], console: Console) -> tuple[Path, object]:
    """The folder under `key`, in which `make(folder)` puts what is not there yet, in parts that are whole or not there;
    and what must live as long as it is used. Without a cache it is a temporary folder."""
    if cache is None:
        aside = _ScratchFolder()
        make(aside.path)
        return aside.path, aside
    folder = cache.root / key[:2] / key
    with _only_one(folder):
        use = _Use(folder)
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
    prune(cache, console)
    return folder, use


def _is_whole(folder: Path, console: Console) -> bool:
    if not folder.exists():
        return False
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST) / 1e6
    with console.progress("checking kept tokens", size, "MB") as advance:
        problems = damage(folder, lambda count: advance(count / 1e6))
    if problems:
        console.say(f"data: the kept tokens are damaged and made again ({problems[0]})")
    return not problems


@cache
def _code() -> str:
    """The sha256 of the modules that turn rows into samples: a newer version of them makes its tokens anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this folder. Where the system has no file locks (Windows), nobody waits."""
    if fcntl is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Said, not left to the closing: a forked worker would hold the lock with its copy of the file.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".lock-{folder.name}"


def _use_file(folder: Path) -> Path:
    return folder.parent / f".use-{folder.name}"


class _Use:
    """While this object lives, or a process that was forked meanwhile, the folder is in use and not removed."""

    def __init__(self, folder: Path) -> None:
        handle = os.open(_use_file(folder), os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, handle)
        os.utime(_use_file(folder))
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_SH)


def prune(cache: Cache, console: Console) -> None:
    """Remove stores that nobody uses, those not used for longest first, until the rest fits; say what went.

    Where the system has no file locks it cannot be known what is in use, and nothing is removed.
    """
    if fcntl is None:
        return
    shelves = sorted(_shelves(cache.root), key=lambda shelf: shelf.used)
    left = total = sum(shelf.size for shelf in shelves)
    removed = []
    for shelf in shelves:
        if left <= cache.most_bytes:
            break
        if _is_removed(shelf):
            removed.append(shelf)
            left -= shelf.size
    if removed:
        console.say(
            f"data: kept tokens took {total / 1e9:.3g} GB, more than data.cache_size: {cache.most_bytes / 1e9:g}; "
            f"removed the {len(removed)} not used for longest ({(total - left) / 1e9:.3g} GB) from {cache.root}"
        )
    if left > cache.most_bytes:
        console.say(
            f"data: kept tokens in {cache.root} take {left / 1e9:.3g} GB, all in use; data.cache_size is exceeded"
        )


@dataclass(frozen=True)
class _Shelf:
    """What lies on disk for one key: its folder, and what killed processes left of others. used: when, last."""

    folder: Path
    paths: tuple[Path, ...]
    size: int
    used: float


def _shelves(root: Path) -> Iterator[_Shelf]:
    of_key: dict[Path, list[Path]] = {}
    for path in root.glob("[0-9a-f][0-9a-f]/*"):
        name = path.name[-KEY_LENGTH:]  # without .tmp- and .old- of training_hub.folders
        if path.is_dir() and len(name) == KEY_LENGTH:
            of_key.setdefault(path.with_name(name), []).append(path)
    for folder, paths in of_key.items():
        sizes = [_size_and_time(file) for path in paths for file in path.rglob("*")]
        used = _size_and_time(_use_file(folder))[1] or max((time for _, time in sizes), default=0.0)
        yield _Shelf(folder, tuple(paths), sum(size for size, _ in sizes), used)


def _size_and_time(path: Path) -> tuple[int, float]:
    """Size and time of change; 0 for what is not there, or goes while another process prunes."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0.0
    return status.st_size, status.st_mtime


def _is_removed(shelf: _Shelf) -> bool:
    """Remove what lies under the key unless somebody makes or uses it."""
    with ExitStack() as locks:
        for file in (_lock_file(shelf.folder), _use_file(shelf.folder)):
            stream = locks.enter_context(file.open("a"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        for path in shelf.paths:
            if path.exists():
                remove(path)
    return True


class _ScratchFolder:
    """A temporary folder that goes when nothing refers to this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="training_hub-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
