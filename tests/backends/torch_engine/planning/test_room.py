"""What a run will write is known before its first step, and said in bytes."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from tests.invariants.run import recipe, train
from training_hub.backends.shared.disk import BESIDE_TENSORS, Room, disk_errors_explained, saves_ahead
from training_hub.backends.torch_engine.planning.room import room
from training_hub.errors import DiskError


def test_the_size_of_a_checkpoint_is_that_of_the_files_written(tiny_model_folder, chat_file, tmp_path):
    from transformers import AutoModelForCausalLM

    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", checkpoint={"interval": 4})
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    expected = room(asked, model, torch.float32, torch.float32, saves=2, kept=0)
    result = train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint={"interval": 4})
    written = sum(path.stat().st_size for path in result.checkpoints[-1].iterdir())
    assert written <= expected.checkpoint <= written + BESIDE_TENSORS
    assert expected.needed == 2 * expected.checkpoint + expected.final


@pytest.mark.parametrize(
    ("keep_last", "saves", "kept", "folders"),
    [(3, 2, 0, 2), (3, 9, 0, 4), (1, 9, 0, 2), (1, 9, 1, 1), (3, 9, 3, 1), (None, 9, 0, 9), (3, 0, 0, 0)],
)
def test_one_more_than_are_kept_is_on_disk_at_once(
    tiny_model_folder, chat_file, tmp_path, keep_last, saves, kept, folders
):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", checkpoint={"keep_last": keep_last, "final": False})
    layer = torch.nn.Linear(8, 8)
    needed = room(asked, layer, torch.float32, torch.float32, saves, kept)
    assert needed.needed == folders * needed.checkpoint


def test_saves_at_the_same_step_are_counted_once():
    assert saves_ahead(interval=2, step=0, total=8, per_epoch=4, at_epoch=True) == 4
    assert saves_ahead(interval=3, step=3, total=8, per_epoch=4, at_epoch=True) == 3
    assert saves_ahead(interval=None, step=0, total=8, per_epoch=4, at_epoch=False) == 0


def test_the_objection_names_bytes_needed_and_free(tmp_path):
    one = Room(checkpoint=1000, final=500, needed=2500)
    assert one.objection(tmp_path, 2500) is None
    line = one.objection(tmp_path, 2499)
    assert line is not None
    assert "needs 2,500 bytes" in line and "has 2,499 free" in line and "checkpoint.keep_last" in line


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left on device")]
)
def test_a_disk_that_refuses_is_named_with_bytes_needed_and_free(tmp_path, error):
    with (
        pytest.raises(DiskError, match=r"step-3 could not be written: .*No space left.*1,234 bytes are needed"),
        disk_errors_explained("checkpoint step-3", tmp_path / "step-3", 1234),
    ):
        raise error
