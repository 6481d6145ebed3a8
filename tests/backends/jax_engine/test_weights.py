"""Masters of the jax engine begin from the files, and what does not move is written as it came, to the last bit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.invariants.run import train


@pytest.mark.parametrize("format_name", ["float64", "float32", "float16"])
def test_weights_that_do_not_move_are_those_of_the_files(format_name, tiny_model_folder, chat_file, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    random = np.random.default_rng(0)
    base = {
        name: (one * (1 + 1e-10 * random.standard_normal(one.shape))).astype(format_name)
        for name, one in load_file(folder / "model.safetensors").items()
    }
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"backend": "jax", "model": {"dtype": "bfloat16"}, "optimizer": {"lr": 1e-30, "weight_decay": 0.0}}
    result = train(folder, chat_file, tmp_path / "run", **settings, training={"steps": 1, "preflight": False})
    final = load_file(result.model_path / "model.safetensors")
    assert final.keys() == base.keys()
    assert all(final[name].dtype == one.dtype and np.array_equal(final[name], one) for name, one in base.items())
