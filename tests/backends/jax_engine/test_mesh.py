"""Divided over eight devices a run has the numbers that it has on one, and goes on from what another mesh saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.backends.jax_engine.tiny import read, saved
from tests.invariants.run import recipe, train
from training_hub.backends.jax_engine.mesh import specs_of
from training_hub.errors import RecipeError

ROOT = Path(__file__).resolve().parents[3]
MESHES = {
    "dp": {"data_parallel_replicate_degree": 8},
    "dp-fsdp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4},
    "fsdp-tp": {"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 4, "tensor_parallel_degree": 2},
}


def on_eight(recipes: list[dict], folder: Path) -> list[dict]:
    """What runs of these recipes in a process with eight devices gave."""
    path = folder / "recipes.json"
    path.write_text(json.dumps(recipes))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    program = [sys.executable, "-m", "tests.backends.jax_engine.divided", str(path)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_mesh_has_the_numbers_of_one_device(tiny_model_folder, chat_file, tmp_path):
    """All losses to 1e-5 in float32: sums are in another order. A mesh goes on from what another saved."""
    asked = {
        "backend": "jax",
        "training": {"steps": 6, "preflight": False, "max_tokens_per_gpu": 256},
        "checkpoint": {"interval": 3, "minutes": None},
    }
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", **asked)
    wanted = np.array([row["loss"] for row in alone.history])

    def stop(report) -> None:
        if report.step == 5:
            raise KeyError("the plug was pulled")

    with pytest.raises(Exception, match="the plug"):
        train(tiny_model_folder, chat_file, tmp_path / "begun", [stop], **asked)
    names = [*MESHES, "begun"]
    recipes = [
        recipe(tiny_model_folder, chat_file, tmp_path / name, **asked, parallelism=MESHES.get(name, MESHES["dp-fsdp"]))
        for name in names
    ]
    made = dict(zip(names, on_eight([one.model_dump() for one in recipes], tmp_path), strict=True))
    assert made["dp"]["devices"] == {"dp": 8, "fsdp": 1, "tp": 1}
    assert made["fsdp-tp"]["devices"] == {"dp": 1, "fsdp": 4, "tp": 2}
    for name, one in made.items():
        assert np.abs(np.array(one["losses"]) - wanted).max() <= 1e-5, name


def test_weights_are_divided_where_their_sides_divide_evenly(tmp_path):
    saved("llama", tmp_path)
    shape, _ = read(tmp_path)
    specs = specs_of(shape, {"dp": 2, "fsdp": 4, "tp": 2})
    assert tuple(specs["model.layers.0.self_attn.q_proj.weight"]) == ("tp", "fsdp")
    assert tuple(specs["model.layers.1.mlp.down_proj.weight"]) == ("fsdp", "tp")
    assert tuple(specs["model.layers.1.mlp.down_proj.lora_A.default.weight"]) == (None, "tp")
    assert tuple(specs["model.embed_tokens.weight"]) == (None, "fsdp")
    uneven = specs_of(shape, {"dp": 1, "fsdp": 3, "tp": 5})
    assert all(axis is None for spec in uneven.values() for axis in spec)


def test_degrees_that_do_not_multiply_to_the_devices_are_refused(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError, match=r"data_parallel_replicate_degree 3 x .* must .*devices of the one process"):
        train(
            tiny_model_folder, chat_file, tmp_path / "run", backend="jax",
            parallelism={"data_parallel_replicate_degree": 3},
        )  # fmt: skip
