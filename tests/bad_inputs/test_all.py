"""That all 92 are there, and that a process of its own says and returns the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.bad_inputs import test_files, test_meaning, test_models, test_runs, test_schema
from tests.bad_inputs.desk import DATA, LOADING, RECIPE, Desk, numbers_of, plain

PARTS = (test_files, test_schema, test_meaning, test_models, test_runs)


def test_all_92_bad_inputs_are_tested() -> None:
    found = set().union(*(numbers_of(part) for part in PARTS)) | {number for number, *_ in test_runs.SETTINGS}
    assert sorted(found) == list(range(1, 93))


@pytest.mark.parametrize(
    ("row", "words", "code", "said"),
    [
        ('{"messages": [}', (), DATA, "rows.jsonl line 3, column 15: broken JSON"),
        ('{"messages": []}', ("--batch-size", "0"), RECIPE, "training.global_batch_size"),
    ],
    ids=["06-broken JSON", "89-batch of 0"],
)
def test_a_process_ends_with_the_code_and_one_message(
    row: str, words: tuple[str, ...], code: int, said: str, desk: Desk
) -> None:
    data = desk.file([plain(1), plain(2), row])
    command = [sys.executable, "-m", "training_hub", "sft", "--model", str(desk.model), "--data", str(data)]
    command += ["--output", str(desk.folder / "out"), "--data.cache", "false", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == code and said in done.stderr
    assert "Traceback" not in done.stderr and LOADING not in done.stdout
