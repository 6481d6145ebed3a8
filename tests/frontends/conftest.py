"""An engine of one's own, installed as a package would install it: the recipe it got is its result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ENGINE = '''
from pathlib import Path

from training_hub.types import StepReport, TrainResult


class Recorder:
    """Trains nothing: calls the watchers once and tells what it was asked to do."""

    name = "recorder"

    def objections(self, recipe):
        return ["seed: 13 brings bad luck. Write seed: 14"] if recipe.seed == 13 else []

    def train(self, recipe, given):
        report = StepReport(1, 1, 1.0, 0.5, 0.1, 1.0, 8, 4, 2, 100.0, 0.1, 0.0, 0.0)
        for watch in given.watchers:
            watch(report)
        rows = [] if given.rows is None else list(given.rows)
        validation = [] if given.validation_rows is None else list(given.validation_rows)
        return TrainResult(
            "finished",
            Path(recipe.output),
            Path(recipe.output) / "final",
            plan={"recipe": recipe.model_dump(), "rows": rows, "validation_rows": validation},
            engine=self.name,
        )
'''

ALGORITHM = """
from training_hub import Algorithm, Backend


class Guess(Backend):
    def execute_training(self, algorithm_params):
        return ("guessed", algorithm_params)


class Guessing(Algorithm):
    backends = {"guess": Guess}

    def train(self, **keywords):
        return self.backend.execute_training({**self.keywords, **keywords})

    def get_required_params(self):
        return {}

    def get_optional_params(self):
        return {}
"""

ENTRY_POINTS = """[training_hub.backends]
recorder = hub_test_engine:Recorder

[training_hub.algorithms]
guessing = hub_test_algorithm:Guessing
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages with the engine `recorder` and the algorithm `guessing`, found by entry points."""
    folder = tmp_path / "site"
    information = folder / "hub_test-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "hub_test_engine.py").write_text(ENGINE)
    (folder / "hub_test_algorithm.py").write_text(ALGORITHM)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: hub-test\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(folder)
    for module in ("hub_test_engine", "hub_test_algorithm"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder
