"""Code blocks taken out of a page and run: Python here, shell lines as commands, YAML as the file it says it is.

A page uses stand-in names (`path/to/model`, `chat.jsonl`); a test gives the real paths for them. Blocks of one page run
in order in one folder, since later ones may use files that earlier ones made. A block is left out by writing
`<!-- not run: reason -->` on the line before it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.frontends.cli import main as command_line

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent>[ ]{0,3})```(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: .+? -->\s*\Z")
COMMANDS = ("training-hub", "python")


@dataclass(frozen=True)
class Block:
    """One fenced code block: its language ('' where none is given), its text and the line on which it starts."""

    page: Path
    line: int
    language: str
    text: str
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def with_names(self, names: Mapping[str, str]) -> str:
        """The text with each stand-in name replaced, the longest first."""
        text = self.text
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name])
        return text


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a Markdown page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start()) + 1,
            language=match["language"],
            text=match["text"],
            is_run=NOT_RUN.search(text, 0, match.start()) is None,
        )
        for match in FENCE.finditer(text)
    ]


def run_python(block: Block, names: Mapping[str, str]) -> dict[str, Any]:
    """Run a Python block in this process, in a namespace of its own; what it defined."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block.with_names(names), str(block), "exec"), namespace)
    return namespace


def shell_lines(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and prompts taken off."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run_shell(block: Block, names: Mapping[str, str], folder: Path) -> list[str]:
    """Run the lines of a shell block that call this package; the lines that were run.

    `training-hub` runs in this process and in the current directory, which spares importing torch for each line.
    Other commands (git, make, pip) need a network or a whole environment: they are only parsed.
    """
    done = []
    for line in shell_lines(block.with_names(names)):
        words = shlex.split(line, comments=True)
        if words[0] not in COMMANDS:
            continue
        code = _python(words[1:], folder) if words[0] == "python" else command_line(words[1:])
        assert code == 0, f"{block} ended with {code}: {line}"
        done.append(line)
    return done


def _python(words: list[str], folder: Path) -> int:
    # The package may lie beside the tests without being installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, timeout=300).returncode


def write_file(block: Block, names: Mapping[str, str], folder: Path) -> Path | None:
    """Write a block whose first line is a comment with a file name (`# run.yaml`); None where it has no such line."""
    named = re.match(r"#\s*([\w./-]+\.(?:ya?ml|jsonl?|jinja))\s*$", block.text.splitlines()[0]) if block.text else None
    if named is None:
        return None
    path = folder / named[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.with_names(names), encoding="utf-8")
    return path


def run_page(page: Path, names: Mapping[str, str], folder: Path) -> list[str]:
    """Run all blocks of a page in `folder` (the current directory); what was run, in order."""
    ran: list[str] = []
    for block in blocks(page):
        if not block.is_run:
            continue
        if block.language == "python":
            run_python(block, names)
            ran.append(f"{block} python")
        elif block.language in ("yaml", "yml"):
            if path := write_file(block, names, folder):
                ran.append(f"{block} {path.name}")
        elif block.language in ("bash", "sh", "shell"):
            ran += [f"{block} {line}" for line in run_shell(block, names, folder)]
    return ran
