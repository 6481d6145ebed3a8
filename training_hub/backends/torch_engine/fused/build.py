"""Our C kernels, built once for this machine's processor and kept in the user's cache folder.

A build takes about two seconds. Where there is no compiler, or it fails, there are no kernels, and torch's operators do
the same work in more passes over memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.c", "panels.c"))
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_SECONDS = 120


@cache
def kernels() -> ctypes.CDLL | None:
    """The library of SOURCES, None where it cannot be had; `kernels_problem` says why."""
    found = _find()
    return found if isinstance(found, ctypes.CDLL) else None


def kernels_problem() -> str | None:
    """Why there are no kernels, None where there are."""
    found = _find()
    return found if isinstance(found, str) else None


@cache
def _find() -> ctypes.CDLL | str:
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, this is {platform.system()}"
    problem = f"there is no C compiler here: install one of {', '.join(COMPILERS)}, or name it in CC"
    for compiler in _compilers():
        try:
            library = _load(compiler)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            problem = f"{compiler} did not build them: {said[-1] if said else type(error).__name__}"
        else:
            library.attention_forward.restype = library.attention_backward.restype = ctypes.c_int
            return library
    return problem


def _load(compiler: str) -> ctypes.CDLL:
    folder = _kept_folder()
    if folder is not None:
        return ctypes.CDLL(str(built(compiler, folder)))
    with tempfile.TemporaryDirectory(prefix="training-hub-kernels-") as aside:
        # Once loaded, a library needs its file no more.
        return ctypes.CDLL(str(built(compiler, Path(aside))))


def built(compiler: str, folder: Path) -> Path:
    """The shared library in `folder`, built there now unless it is there for these sources, compiler and processor."""
    texts = (compiler, " ".join(FLAGS), _processor())
    made_from = (*(source.read_bytes() for source in SOURCES), *(text.encode() for text in texts))
    name = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:32]
    library = folder / f"kernels-{name}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        compiled, linked = [str(Path(aside) / f"{source.stem}.o") for source in SOURCES], Path(aside) / "kernels.so"
        for source, file in zip(SOURCES, compiled, strict=True):
            _call(compiler, *FLAGS, "-c", str(source), "-o", file)
        # Linked without its own OpenMP: the threads are those that torch has already started.
        _call(compiler, "-shared", *compiled, "-o", str(linked), "-lm")
        os.replace(linked, library)
    return library


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


def _compilers() -> list[str]:
    chosen = os.environ.get("CC")
    return [found for name in ((chosen,) if chosen else COMPILERS) if (found := shutil.which(name))]


def _processor() -> str:
    """What decides the instructions that -march=native may use, so that machines may share a home folder."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _kept_folder() -> Path | None:
    """The user's cache folder for kernels; None where it cannot be written to, or others can write to it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "training_hub" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:  # a home that is read-only, or not there
        return None
    is_private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_private and os.access(folder, os.W_OK) else None
