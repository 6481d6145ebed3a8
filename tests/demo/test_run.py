"""The demo itself, shortened: every stage runs, offline, into a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training_hub.demo.__main__ import fresh_folder, main
from training_hub.demo.base import BASE_FOLDER, FILES


def test_the_base_model_is_shipped_whole_and_small():
    sizes = {name: (BASE_FOLDER / name).stat().st_size for name in FILES}
    assert sum(sizes.values()) < 1_600_000


def test_a_short_demo_runs_through_and_says_that_it_was_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    short = ["--output", str(folder), "--steps", "4", "--questions", "128", "--held-out", "22"]
    assert main(short) == 1, "four steps do not reach the goal, and the demo says so"
    shown = capsys.readouterr().out
    assert "Right answers on held-out questions" in shown
    assert "from_pretrained(" in shown
    assert "sft --model path/to/model" in shown
    assert (folder / "run" / "final" / "model.safetensors").is_file()
    rows = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 128
    assert set(json.loads(rows[0])) == {"messages"}
    assert main(short) == 1, "a second demo begins anew in the same place"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="did not write"):
        fresh_folder(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
