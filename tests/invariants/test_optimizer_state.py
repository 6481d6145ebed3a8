"""Runs whose optimizer keeps less are as whole as others: same curve, resumed bit for bit, planned with less memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.run import final_weights, train
from training_hub.errors import TrainingError

EVERY_STEP = {"interval": 1, "keep_last": 2, "minutes": None}


def low(state: str, **more):
    return {"model": {"dtype": "bfloat16"}, "optimizer": {"state": state}, "checkpoint": EVERY_STEP, **more}


class StopAt:
    """A callback that ends the run after a step, as a crash in user code would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, report) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


@pytest.fixture(scope="module")
def full(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("runs") / "full", **low("full"))


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_a_run_keeps_its_curve_and_goes_on_to_the_same_bits(tiny_model_folder, chat_file, tmp_path, full, state):
    unbroken = train(tiny_model_folder, chat_file, tmp_path / "unbroken", **low(state))
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(3)], **low(state))
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **low(state))
    first, second = final_weights(resumed), final_weights(unbroken)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in unbroken.history]
    # bfloat16 has steps of 0.4 %; a weight that rounds the other way moves later losses by less than one.
    expected = [row["loss"] for row in full.history]
    assert [row["loss"] for row in unbroken.history] == pytest.approx(expected, rel=0.004)


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_a_checkpoint_holds_float32_masters_and_the_plan_counts_what_is_kept(
    tiny_model_folder, chat_file, tmp_path, full, state
):
    run = train(tiny_model_folder, chat_file, tmp_path / "run", **low(state, training={"steps": 2}))
    weights = load_file(run.checkpoints[-1] / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any((weight != weight.bfloat16().float()).any() for weight in weights.values())
    planned, plain = run.plan["memory_gib"], full.plan["memory_gib"]
    assert planned["masters"] == plain["masters"] / 2
    kept = load_file(run.checkpoints[-1] / "optimizer.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values() if tensor.dim())
    assert planned["optimizer"] * 2**30 == pytest.approx(size)
    assert (planned["optimizer"] < plain["optimizer"]) == (state == "8bit")


def test_only_adamw_keeps_less(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer\.state"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **low("full", optimizer={"state": "8bit", "name": "SGD"}))


@pytest.mark.parametrize("state", ["split", "8bit"])
def test_float64_keeps_its_state_whole(tiny_model_folder, chat_file, tmp_path, state):
    settings = low(state, model={"dtype": "float64"})
    with pytest.raises(ValueError, match=r"optimizer\.state: .* computes in float32"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **settings)
