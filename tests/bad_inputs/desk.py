"""What the cases share: rows, files made from them, and a run of the real command line with what it said."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.frontends.cli import main

RECIPE, DATA, CHECKPOINT, DISK = 2, 3, 5, 75
"""Exit codes: the recipe, the data, what lies in the output folder, or the room there is wrong."""

ONE_STEP = """--training.steps 1 --training.global_batch_size 2 --training.max_seq_len 256 --training.preflight false
--checkpoint.final false --data.cache false --data.workers 0 --monitoring.console plain""".split()
LOADING = "model: loading"

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and all it said."""

    code: int
    out: str
    err: str

    def trained(self, *words: str) -> None:
        """It took its step, and said these words."""
        assert self.code == 0, self.err
        assert LOADING in self.out and "finished: run in" in self.out
        _holds(self.out, words)

    def refused(self, code: int, *words: str) -> None:
        """It ended with this exit code and these words before any weight was read, without a traceback."""
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert LOADING not in self.out
        assert self.err.startswith("error: ") and "Traceback" not in self.err
        _holds(self.err, words)


def _holds(text: str, words: Sequence[str]) -> None:
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in:\n{text}"


class Desk:
    """A folder of its own, a model, and `run` to train one step on what is put there."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        self.model = model

    def file(self, content: bytes | str | Sequence[Any], name: str = "rows.jsonl") -> Path:
        """A file of these bytes, this text, or rows of which each is JSON or a line as it stands."""
        path = self.folder / name
        path.write_bytes(as_bytes(content))
        return path

    def run(
        self, data: Path | str, *words: str, model: Path | None = None, output: Path | str | None = None
    ) -> Outcome:
        """`training-hub sft` for one step."""
        output = output or self.folder / "out"
        return run(
            "sft", "--model", f"{model or self.model}", "--data", f"{data}", "--output", f"{output}", *ONE_STEP, *words
        )

    def train(self, rows: Sequence[Any], *words: str, **settings: Any) -> Outcome:
        """The same on a file of these rows."""
        return self.run(self.file(rows), *words, **settings)


def run(*words: str) -> Outcome:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return Outcome(code, out.getvalue(), err.getvalue())


def as_bytes(content: bytes | str | Sequence[Any]) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode("utf-8")
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content).encode("utf-8")


def chat(*turns: tuple[str, Any] | Row, **columns: Any) -> Row:
    """A row of (role, content) pairs or whole messages."""
    messages = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]
    return {"messages": messages, **columns}


def plain(number: int) -> Row:
    """A row that nothing is wrong with; another one for each number."""
    return chat(("user", f"What comes after {number}?"), ("assistant", f"{number + 1}."))


GOOD, ALSO_GOOD = plain(1), plain(2)


@dataclass(frozen=True)
class Case:
    """One bad input and what is wanted: `code` 0 is a run that trains. `words` are said, of a refusal on stderr.

    `content` is what `Desk.file` takes, or makes it.
    """

    number: int
    name: str
    content: Any
    code: int
    words: tuple[str, ...]
    options: tuple[str, ...] = ()
    file: str = "rows.jsonl"

    @property
    def id(self) -> str:
        return f"{self.number:02}-{self.name}"

    def hold(self, desk: Desk) -> None:
        content = self.content() if callable(self.content) else self.content
        outcome = desk.run(desk.file(content, self.file), *self.options)
        if self.code:
            outcome.refused(self.code, *self.words)
        else:
            outcome.trained(*self.words)


def trains(
    number: int, name: str, content: Any, *words: str, options: Sequence[str] = (), file: str = "rows.jsonl"
) -> Case:
    return Case(number, name, content, 0, words, tuple(options), file)


def refuses(
    number: int,
    name: str,
    content: Any,
    *words: str,
    options: Sequence[str] = (),
    file: str = "rows.jsonl",
    code: int = DATA,
) -> Case:
    return Case(number, name, content, code, words, tuple(options), file)


def numbers_of(module: Any) -> set[int]:
    """The numbers of the cases that a module tests: those of its table, and of functions called test_NN_..."""
    named = {int(name[5:7]) for name in vars(module) if name.startswith("test_") and name[5:7].isdigit()}
    return named | {case.number for case in getattr(module, "CASES", ())}
