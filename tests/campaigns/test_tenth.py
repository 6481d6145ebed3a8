"""A seeded tenth of the campaign that breaks runs on purpose; `make campaign` is all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.case import AS_WANTED, Case

REPOSITORY = Path(__file__).parents[2]
MINIMUM_CASES = 90


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict[str, str]]:
    """A process of its own: forks must not inherit the threads of the other tests."""
    folder = tmp_path_factory.mktemp("campaign")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.campaigns", "--tenth", "--write", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]


def test_every_fault_ends_as_wanted(cases):
    assert len(cases) >= MINIMUM_CASES
    wrong = [f"{case['family']}: {case['fault']}: {case['happened']}" for case in cases if case["verdict"] != AS_WANTED]
    assert wrong == []


def test_a_case_that_went_wrong_is_counted_as_such():
    assert Case("f", "x", "w").verdict == AS_WANTED
    assert Case("f", "x", "w", "did not go on").verdict == "not as wanted"
    assert Case("f", "x", "w", "other numbers", is_silent=True).verdict == "silent"
