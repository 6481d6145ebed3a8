"""Validation rows in several sets, packed or not, and runs that a callback ends: the numbers stay those of one set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import CONVERSATIONS
from tests.invariants.run import recipe
from training_hub.backends import Given
from training_hub.backends.torch_engine.assembly import assemble
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.loop import evaluate
from training_hub.backends.torch_engine.materials import load_materials
from training_hub.data.feed import validation_packs
from training_hub.launch import run
from training_hub.monitoring.console import SilentConsole
from training_hub.types import StepReport, TrainResult

SETS = {"short": list(CONVERSATIONS[40:45]), "long": [CONVERSATIONS[n] for n in (48, 51, 54)]}
QUICK = {"preflight": False, "steps": 2}


def with_rows(model: Path, chat: Path, output: Path, rows: Any, **data: Any) -> TrainResult:
    made = recipe(model, chat, output, training=QUICK, data=data)
    return run(made, Given(validation_rows=rows))


def test_each_of_several_sets_is_measured_as_if_it_were_the_only_one(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    together = with_rows(tiny_model_folder, chat_file, tmp_path / "both", SETS)
    alone = {n: with_rows(tiny_model_folder, chat_file, tmp_path / n, rows) for n, rows in SETS.items()}
    last = together.history[-1]
    weights = {}
    for name, result in alone.items():
        # The same float32 sums in packs of other rows.
        assert last[f"validation_loss/{name}"] == pytest.approx(result.metrics["validation_loss"], abs=1e-5)
        assert not any(key.startswith("validation_loss/") for key in result.history[-1]), "one set has no parts"
        weights[name] = result.data["validation_samples"]
    assert together.data["validation_samples"] == sum(weights.values())
    low, high = sorted(last[f"validation_loss/{name}"] for name in SETS)
    assert low < last["validation_loss"] < high


@pytest.mark.parametrize(("packing", "validation_packing"), [(True, False), (False, True), (True, None)])
def test_validation_rows_are_packed_as_asked_and_give_the_same_loss(
    packing: bool, validation_packing: bool | None, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    data = {"packing": packing, "validation_packing": validation_packing, "validation_fraction": 0.25}
    made = recipe(tiny_model_folder, chat_file, tmp_path / "out", data=data)
    device, console = torch.device("cpu"), SilentConsole()
    materials = load_materials(made, Given(), console)
    run = assemble(made, load_model(made, device, torch.float32), materials, device, torch.float32, console)
    wanted = packing if validation_packing is None else validation_packing
    assert (run.feed.settings.is_packed, run.packs_validation) == (packing, wanted)
    assert run.validation is not None
    losses = []
    for run.packs_validation, num_packs in ((wanted, 1 if wanted else 16), (not wanted, 16 if wanted else 1)):
        assert len(list(validation_packs(run.validation, 8192, run.packs_validation))) == num_packs
        losses.append(evaluate(run, run.validation))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_callback_ends_a_run_with_its_model(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    class Enough:
        stop_reason = ""

        def __call__(self, report: StepReport) -> None:
            self.stop_reason = "seen enough" if report.step == 3 else ""

    made = recipe(tiny_model_folder, chat_file, tmp_path / "out", training={"preflight": False})
    result = run(made, Given(watchers=[Enough()]))
    assert (result.status, result.reason, len(result.history)) == ("stopped", "seen enough", 3)
    assert result.model_path is not None
    assert (result.model_path / "model.safetensors").is_file()
    again = run(made)
    assert (again.status, again.seconds) == ("stopped", result.seconds), "it is over, and taken as it is"
