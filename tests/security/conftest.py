"""What every test here needs: the command line in this process, and a record of what Python was asked to do."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from training_hub.frontends.cli import main

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move")
WRITING = frozenset("wax+")


@dataclass
class Record:
    """Audit events while `is_on`: connections wanted, programs started, files written, modules imported by path."""

    is_on: bool = False
    network: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in NETWORK:
            self.network.append(f"{event} {arguments}")
            raise OSError(f"no network in these tests: {event} {arguments}")
        if event in PROGRAMS:
            self.programs.append(f"{event} {arguments}")
        elif event in WRITES and not (isinstance(arguments[-1], int) and arguments[-1] >= 0):
            # A number from 0 is an open folder that the name is relative to; the folder's own name was noted before.
            self.written |= {str(each) for each in arguments if isinstance(each, str | bytes | Path)}
        elif event == "open" and isinstance(arguments[1], str) and WRITING & set(arguments[1]):
            self.written.add(str(arguments[0]))
        elif event == "compile" and isinstance(arguments[1], str):
            self.sources.add(arguments[1])


RECORD = Record()
# An audit hook stays for the life of the process; it looks away while the record is off.
sys.addaudithook(RECORD.note)


@pytest.fixture
def watched() -> Iterator[Callable[[], Any]]:
    """`with watched() as record:` records what happens within the block, and refuses connections."""

    @contextmanager
    def recording() -> Iterator[Record]:
        for kept in (RECORD.network, RECORD.programs, RECORD.written, RECORD.sources):
            kept.clear()
        RECORD.is_on = True
        try:
            yield RECORD
        finally:
            RECORD.is_on = False

    yield recording
    RECORD.is_on = False


@dataclass(frozen=True)
class Said:
    """The end of a command: its exit code and everything it printed."""

    code: int
    text: str


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line with these words. An exception that is no error of this package goes through, as a bug."""

    def run(*words: str) -> Said:
        capfd.readouterr()
        code = main(list(words))
        shown = capfd.readouterr()
        return Said(code, shown.out + shown.err)

    return run


@pytest.fixture
def words(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a one-step run of the tiny model, with settings changed: words(model=..., data=..., output=...)."""

    def made(*more: str, **changed: Any) -> list[str]:
        named = {"model": tiny_model_folder, "data": chat_file, "output": tmp_path / "run", **changed}
        flags = [f"--{name}={value}" for name, value in named.items()]
        fixed = ["--training.steps=1", "--training.max_seq_len=256", "--training.global_batch_size=2"]
        rest = [*fixed, "--training.preflight=false", "--data.workers=0", "--data.cache=false", "--model.dtype=float32"]
        return ["sft", *flags, *rest, *more]

    return made


def outside(written: set[str], *allowed: Path) -> list[str]:
    """Places that were written to and lie under none of `allowed`, nor in a scratch folder of ours."""
    roots = [path.resolve() for path in allowed] + [Path("/dev"), Path("/proc")]
    real = [Path(place).resolve() for place in written]
    scratch = f"{Path(tempfile.gettempdir()).resolve()}/training_hub-"
    real = [place for place in real if not str(place).startswith(scratch)]
    return sorted(str(place) for place in real if not any(place.is_relative_to(root) for root in roots))
