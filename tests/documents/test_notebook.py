"""The notebook of nine steps, executed from top to bottom without a browser: its cells, in one namespace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents.snippets import ROOT
from training_hub.errors import RecipeError

NOTEBOOK = ROOT / "examples" / "interactive_config_notebook.ipynb"
STEPS = (
    "Setup environment",
    "Configure model and process settings",
    "Configure optimizer and LR scheduler",
    "Configure training settings",
    "Configure checkpoint and activation checkpointing",
    "Configure communication and parallelism settings",
    "Combine all configurations",
    "Save to YAML file",
    "Optional - run training",
)


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


def run(upto: int | None = None, **changed: dict[str, Any]) -> dict[str, Any]:
    """What the code cells define, run in order; `changed`: keys put into a configuration before step 7."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    for number, cell in enumerate(code[:upto], start=1):
        if number == 7:
            for name, keys in changed.items():
                namespace[name].update(keys)
        exec(compile("".join(cell["source"]), f"step {number}", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_has_the_nine_steps_of_the_page_and_no_results_in_it():
    titles = re.findall(r"^## Step (\d): (.*)$", "\n".join("".join(cell["source"]) for cell in cells()), re.M)
    assert titles == [(str(number), title) for number, title in enumerate(STEPS, start=1)]
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) == len(STEPS)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_its_cells_build_show_check_save_and_run_a_configuration(capsys: pytest.CaptureFixture[str]):
    made = run()
    printed = capsys.readouterr().out
    assert yaml.safe_load(Path("notebook-run/my_config.yaml").read_text())["training"]["steps"] == 10
    assert "lr: 0.0003" in printed or "lr: 3.0e-04" in printed, "the configuration is shown"
    assert "10 steps of 4 samples" in printed
    assert "10 / 10|Loss:" in printed
    assert made["result"].status == "finished"
    assert made["result"].metrics["loss"] < made["result"].history[0]["loss"]
    assert (made["result"].model_path / "model.safetensors").is_file()


def test_a_mistake_is_told_in_step_seven():
    with pytest.raises(RecipeError, match=r"training\.stepz: not a key. Did you mean training\.steps"):
        run(upto=7, training_config={"stepz": 5})
    assert not Path("notebook-run/checkpoints").exists()
