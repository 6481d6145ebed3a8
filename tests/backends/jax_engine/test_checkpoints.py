"""Checkpoints that processes of the torch engine wrote in pieces are read whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training_hub.backends.jax_engine.checkpoints import Checkpoints, shapes_in
from training_hub.backends.shared.checkpoint_folders import write_checkpoint
from training_hub.backends.torch_engine.layouts.pieces import Cut
from training_hub.backends.torch_engine.saving.tensor_files import Pieces, piece_file, write_pieces
from training_hub.errors import CheckpointError

WHOLE = torch.arange(12.0).reshape(4, 3)


def written(root, halves: int) -> Checkpoints:
    """Step 1 as the first of two processes wrote it, or both, each with one half of the rows."""
    with write_checkpoint(root, 1, {"seed": 0}, "") as folder:
        for rank in range(halves):
            rows = slice(2 * rank, 2 * rank + 2)
            pieces = Pieces({"weight": WHOLE[rows].clone()}, {"weight": Cut((4, 3), (2 * rank, 0), (2, 3))})
            for name in ("model", "optimizer"):
                write_pieces(folder / piece_file(name, rank), pieces)
    return Checkpoints(root)


def test_pieces_are_put_together(tmp_path):
    checkpoints = written(tmp_path / "checkpoints", halves=2)
    weights, optimizer, facts = checkpoints.load(1)
    assert np.array_equal(weights["weight"], WHOLE.numpy()) and np.array_equal(optimizer["weight"], WHOLE.numpy())
    assert facts["seed"] == 0 and shapes_in(checkpoints.folder(1)) == {"weight": (4, 3)}


def test_a_piece_that_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="weight: 6 of its numbers are in no file"):
        written(tmp_path / "checkpoints", halves=1).load(1)
