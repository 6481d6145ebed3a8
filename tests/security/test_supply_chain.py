"""No version with a known hole is allowed, and everything that is installed for tests and checks is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))
# The first version without the holes named, of packages that read what strangers wrote, or build us.
SAFE_FROM = {
    "torch": (2, 10),  # CVE-2025-32434, CVE-2026-24747: code through weights_only
    "transformers": (5, 10),  # CVE-2026-4372, CVE-2026-5241, CVE-2026-9856: code and files through a model folder
    "jinja2": (3, 1, 6),  # CVE-2024-56326, CVE-2024-56201, CVE-2025-27516: ways out of the sandbox
    "pyarrow": (14, 0, 1),  # CVE-2023-47248: code through a Parquet file
    "mlflow": (3, 11),  # CVE-2026-2652, CVE-2026-0545
    "setuptools": (78, 1, 1),  # CVE-2025-47273: files outside the folder
}


def requirements() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [*PROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=\[;]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("name", SAFE_FROM)
def test_no_version_with_a_known_hole_is_allowed(name: str):
    floors = [one for one in [*requirements(), *PROJECT["build-system"]["requires"]] if name_of(one) == name]
    assert floors
    for floor in floors:
        version = tuple(int(part) for part in floor.partition(">=")[2].split("."))
        assert version >= SAFE_FROM[name], floor


def test_everything_that_the_project_asks_for_is_pinned():
    lines = (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    named = [name_of(pin) for pin in pins]
    assert len(set(named)) == len(named)
    assert {name_of(one) for one in requirements()} <= set(named)
