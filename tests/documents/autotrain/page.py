"""The rows that AutoTrain's guide speaks of, and its command lines, here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from training_hub.frontends.cli import main

TEXTS = [
    "Question: What is Python? Answer: Python is a programming language.",
    "Question: What is ML? Answer: Machine Learning is a subset of AI.",
]
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is Python?"},
            {"role": "assistant", "content": "Python is a high-level programming language."},
        ]
    }
]


def command(line: str, capsys: pytest.CaptureFixture[str] | None = None) -> tuple[int, str]:
    """The exit code of a line of the guide, and what it says of errors."""
    code = main(shlex.split(line.replace("aitraining", "").replace("\\\n", " "), comments=True))
    return code, capsys.readouterr().err if capsys else ""


def recipe_in(folder: str) -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "recipe.yaml").read_text())


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    code, said = command(line, capsys)
    assert code != 0
    return said
