"""A checkpoint is found whole or passed over; the last good one is never removed."""

from __future__ import annotations

import json

import pytest
import torch

from training_hub.backends.torch_engine.saving.checkpoints import Checkpoints, State
from training_hub.errors import CheckpointError


def state(step: int) -> State:
    weights = {"w": torch.full((50,), float(step)), "b": torch.arange(3, dtype=torch.bfloat16)}
    return State(step, weights, {"w/exp_avg": torch.full((50,), step / 7)}, {"seed": 42, "best": [0.5, step]})


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    folder = checkpoints.save(state(4), "algorithm: sft\n")
    assert folder.name == "step-4"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
        "recipe.yaml",
        "manifest.json",
    }
    loaded = checkpoints.load(4)
    for name, tensor in state(4).weights.items():
        assert loaded.weights[name].dtype == tensor.dtype
        assert torch.equal(loaded.weights[name], tensor)
    assert torch.equal(loaded.optimizer["w/exp_avg"], state(4).optimizer["w/exp_avg"])
    assert loaded.facts["best"] == [0.5, 4]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 10):
        checkpoints.save(state(step), "")
    path = tmp_path / "step-10" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    assert checkpoints.newest_valid(said.append) == 2
    assert "step-10" in said[0] and "optimizer.safetensors" in said[0]


def test_where_none_is_whole_the_error_names_each_file_and_the_way_out(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), "")
    (tmp_path / "step-1" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing(.|\n)*checkpoint\.resume: restart"):
        checkpoints.newest_valid(lambda line: None)


def test_the_newest_is_told_by_its_step_and_not_by_name_order_or_time(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (100, 20, 9):
        checkpoints.save(state(step), "")
    assert checkpoints.steps() == [9, 20, 100]
    assert checkpoints.newest_valid(print) == 100


def test_half_written_folders_are_not_checkpoints(tmp_path):
    (tmp_path / ".tmp-step-5").mkdir()
    (tmp_path / "step-x").mkdir()
    assert Checkpoints(tmp_path).newest_valid(print) is None


def test_the_last_k_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(state(step), "", protected=(2,))
    assert checkpoints.steps() == [2, 4, 5]


def test_a_failed_save_keeps_every_earlier_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(state(1), "")
    unwritable = State(2, state(2).weights, {}, {"seed": object()})
    with pytest.raises(TypeError):
        checkpoints.save(unwritable, "")
    assert checkpoints.newest_valid(print) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_versions(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state(1), "") / "trainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        checkpoints.load(1)


def test_a_damaged_later_step_does_not_push_out_the_last_whole_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(state(6), "")
    (tmp_path / "step-6" / "model.safetensors").unlink()
    checkpoints.save(state(4), "")
    checkpoints.save(state(5), "")
    assert checkpoints.steps() == [5, 6]
    assert checkpoints.newest_valid(lambda line: None) == 5


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(step), "")
    (tmp_path / "step-1").rename(tmp_path / "step-9")
    said = []
    assert checkpoints.newest_valid(said.append) == 2
    assert "step-9 holds step 1" in said[0]


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError, match="is gone"):
        Checkpoints(tmp_path / "run" / "checkpoints").save(state(1), "")
    assert not (tmp_path / "run").exists()
