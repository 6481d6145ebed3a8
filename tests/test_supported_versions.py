"""What pyproject.toml promises to run with is what the tests run with: its lower bounds, and what is newest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_INSTALLED = {"dev", "mlflow", "monarch", "wandb"}  # extras that the tests do without
ASKED = {one for name, extra in PROJECT["optional-dependencies"].items() if name not in NOT_INSTALLED for one in extra}
TESTED = sorted({*PROJECT["dependencies"], *ASKED})


def pins(file: str) -> dict[str, str]:
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def numbers(version: str) -> list[int]:
    """The parts of a version but for zeros at its end."""
    found = [int(part) for part in version.split(".")]
    while found and not found[-1]:
        found.pop()
    return found


@pytest.mark.parametrize("requirement", TESTED)
def test_the_oldest_supported_version_is_tested_and_the_newest_lies_above_it(requirement: str):
    name, lowest, highest = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
    assert numbers(pins("constraints-oldest.txt")[name]) == numbers(lowest)
    newest = numbers(pins("constraints.txt")[name])
    assert numbers(lowest) <= newest and (highest is None or newest < numbers(highest))


def test_the_readme_names_both_ends():
    said = " ".join((HERE / "README.md").read_text(encoding="utf-8").split())
    lowest = dict(one.split(">=") for one in PROJECT["dependencies"])
    newest = pins("constraints.txt")
    assert f"torch {lowest['torch']} or newer and transformers {lowest['transformers']} or newer" in said
    assert f"torch {newest['torch']} and transformers {newest['transformers']} (`constraints.txt`" in said
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in said


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_no_package_is_pinned_twice(file: str):
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    assert len(pins(file)) == len([line for line in lines if line and not line.startswith("#")])
