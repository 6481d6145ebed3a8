"""Tokenised data kept on disk: one sealed folder per key, where the key is the hash of everything it was made from.

Two processes that want the same key do not make it twice: one makes it, the other waits and then finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from training_hub.data.store import TokenStore
from training_hub.folders import damage
from training_hub.types import Console


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
    root: Path | None, key: str | None, make: Callable[[Path], None], source_weights: Sequence[float], console: Console
) -> TokenStore:
    """The store under `key`: found whole in `root`, else made now by `make(folder)`.

    A damaged one is said and made again. Without root or key it is made in a temporary folder, which goes with the
    store.
    """
    if root is None or key is None:
        aside = _ScratchFolder()
        make(aside.path / "store")
        return TokenStore.open(aside.path / "store", source_weights, keep_alive=aside)
    folder = root / key[:2] / key
    with _only_one(folder):
        if _is_whole(folder, console):
            console.say(f"data: tokenised before, taken from {folder}")
        else:
            make(folder)
    return TokenStore.open(folder, source_weights)


def _is_whole(folder: Path, console: Console) -> bool:
    if not folder.exists():
        return False
    problems = damage(folder)
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
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".lock-{folder.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Said, not left to the closing: a forked worker would hold the lock with its copy of the file.
            fcntl.flock(lock, fcntl.LOCK_UN)


class _ScratchFolder:
    """A temporary folder that goes when nothing refers to this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="training_hub-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
