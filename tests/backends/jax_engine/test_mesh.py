"""Divided over eight devices a run has the numbers that it has on one, and goes on from what another mesh saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.backends.jax_engine.tiny import losses, random_pack, read, saved
from tests.invariants.run import recipe, train
from training_hub.backends.jax_engine.batches import CHUNK, Sizes, side_by_side
from training_hub.backends.jax_engine.by_source import BySource
from training_hub.backends.jax_engine.mesh import axes_of, specs_of
from training_hub.backends.jax_engine.mixture import answers
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism

ROOT = Path(__file__).resolve().parents[3]
ONE = {"data_parallel_replicate_degree": 1}
MESHES: dict[str, dict[str, int]] = {
    "dp": {"data_parallel_replicate_degree": 8},
    "dp-fsdp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4},
    "fsdp-tp": {**ONE, "data_parallel_shard_degree": 4, "tensor_parallel_degree": 2},
    "sp": {**ONE, "context_parallel_degree": 8},
    "fsdp-tp-sp": {**ONE, "data_parallel_shard_degree": 2, "tensor_parallel_degree": 2, "context_parallel_degree": 2},
}
OF_EXPERTS = {
    "dp-ep": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4, "expert_parallel_degree": 4},
    "fsdp-ep-tp": {
        **ONE,
        "data_parallel_shard_degree": 4,
        "expert_parallel_degree": 2,
        "tensor_parallel_degree": 2,
    },
    "ep-sp": {**ONE, "data_parallel_shard_degree": 4, "expert_parallel_degree": 4, "context_parallel_degree": 2},
}
AXES = ("dp", "fsdp", "ep", "tp", "sp")
ASKED: dict[str, Any] = {
    "backend": "jax",
    "training": {"steps": 6, "preflight": False, "max_tokens_per_gpu": 256, "activation_checkpointing": "none"},
    "checkpoint": {"interval": 3, "minutes": None},
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


def stop_at_five(report) -> None:
    if report.step == 5:
        raise KeyError("the plug was pulled")


def compared(model: Path, data: Path, folder: Path, meshes: dict, begun: dict[str, int], **asked: Any) -> list[dict]:
    """Runs on each mesh, and one that `begun` goes on with, whose losses are those of one device to 1e-5."""
    alone = train(model, data, folder / "alone", **asked)
    with pytest.raises(Exception, match="the plug"):
        train(model, data, folder / "begun", [stop_at_five], **asked)
    every = {**meshes, "begun": begun}
    recipes = [recipe(model, data, folder / name, **asked, parallelism=mesh) for name, mesh in every.items()]
    made = on_eight([one.model_dump() for one in recipes], folder)
    for name, one in zip(every, made, strict=True):
        assert np.abs(np.array(one["losses"]) - losses(alone)).max() <= 1e-5, name
    return made


@pytest.mark.slow
def test_every_mesh_has_the_numbers_of_one_device(tiny_model_folder, chat_file, tmp_path):
    """All losses to 1e-5 in float32: sums are in another order. A mesh goes on from what one device saved."""
    made = compared(tiny_model_folder, chat_file, tmp_path, MESHES, MESHES["fsdp-tp-sp"], **ASKED)
    layouts = [tuple(one["devices"][axis] for axis in AXES) for one in made]
    assert layouts == [
        (8, 1, 1, 1, 1), (2, 4, 1, 1, 1), (1, 4, 1, 2, 1), (1, 1, 1, 1, 8), (1, 2, 1, 2, 2), (1, 2, 1, 2, 2),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lora_sft", "osft"])
def test_adapters_and_protected_weights_are_the_same_on_every_mesh(algorithm, tiny_model_folder, chat_file, tmp_path):
    """All losses to 1e-5 in float32."""
    own = {"osft": {"unfreeze_rank_ratio": 0.3}} if algorithm == "osft" else {"lora": {"r": 4}}
    meshes = {name: MESHES[name] for name in ("fsdp-tp", "sp")}
    compared(tiny_model_folder, chat_file, tmp_path, meshes, MESHES["fsdp-tp-sp"], algorithm=algorithm, **own, **ASKED)


@pytest.mark.slow
def test_what_a_model_drops_does_not_depend_on_where_its_tokens_lie(tiny_model_folder, chat_file, tmp_path):
    """All losses to 1e-5 in float32, where packs are the same: what is dropped follows from them, not from devices."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    saved("gpt2", tmp_path / "model", vocab_size=len(tokenizer), attn_pdrop=0.2, embd_pdrop=0.1, resid_pdrop=0.3)
    tokenizer.save_pretrained(tmp_path / "model")
    compared(tmp_path / "model", chat_file, tmp_path, {"sp": MESHES["sp"]}, MESHES["sp"], **ASKED)


@pytest.mark.slow
def test_experts_that_are_dealt_out_have_the_numbers_of_one_device(tiny_model_folder, chat_file, tmp_path):
    """All losses to 1e-5 in float32."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    changes = {"vocab_size": len(tokenizer), "initializer_range": 0.02, "num_hidden_layers": 1}
    saved("mixtral", tmp_path / "model", **changes)
    tokenizer.save_pretrained(tmp_path / "model")
    made = compared(tmp_path / "model", chat_file, tmp_path, OF_EXPERTS, OF_EXPERTS["fsdp-ep-tp"], **ASKED)
    layouts = [tuple(one["devices"][axis] for axis in AXES) for one in made]
    assert layouts == [(2, 1, 4, 1, 1), (1, 2, 2, 2, 1), (1, 1, 4, 1, 2), (1, 2, 2, 2, 1)]


def test_weights_are_divided_where_their_sides_divide_evenly(tmp_path):
    saved("llama", tmp_path)
    shape, _ = read(tmp_path)
    specs = specs_of(shape, {"dp": 2, "fsdp": 2, "ep": 2, "tp": 2, "sp": 1})
    assert tuple(specs["model.layers.0.self_attn.q_proj.weight"]) == ("tp", ("fsdp", "ep"))
    assert tuple(specs["model.layers.1.mlp.down_proj.weight"]) == (("fsdp", "ep"), "tp")
    assert tuple(specs["model.layers.1.mlp.down_proj.lora_A.default.weight"]) == (None, "tp")
    # 48 hidden by 32: the longer side, on the left, is that of the inner units.
    assert tuple(specs["model.layers.1.mlp.down_proj.weight/left"]) == ("tp", None)
    assert tuple(specs["model.layers.1.mlp.down_proj.weight@right"]) == (None, ("fsdp", "ep"))
    assert tuple(specs["model.embed_tokens.weight"]) == (None, ("fsdp", "ep"))
    uneven = specs_of(shape, {"dp": 1, "fsdp": 3, "ep": 1, "tp": 5, "sp": 1})
    assert all(axis is None for spec in uneven.values() for axis in spec)


def test_experts_are_dealt_out_and_divided(tmp_path):
    saved("qwen3-moe", tmp_path)
    shape, _ = read(tmp_path)
    specs = specs_of(shape, {"dp": 1, "fsdp": 2, "ep": 2, "tp": 2, "sp": 1})
    assert tuple(specs["model.layers.0.mlp.experts.*.gate_proj.weight"]) == ("ep", "tp", "fsdp")
    assert tuple(specs["model.layers.0.mlp.experts.*.down_proj.weight"]) == ("ep", "fsdp", "tp")
    assert tuple(specs["model.layers.0.mlp.gate.weight"]) == (None, ("fsdp", "ep"))


def test_what_parts_of_the_experts_say_adds_up_to_what_all_say(tmp_path):
    """To rounding: 1e-6 of the largest."""
    saved("qwen3-moe", tmp_path)
    shape, loaded = read(tmp_path)
    names = ("gate.weight", *(f"experts.*.{one}_proj.weight" for one in ("gate", "up", "down")))
    router, *experts = (jnp.asarray(loaded.weights[f"model.layers.0.mlp.{name}"]) for name in names)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, shape.width)), jnp.float32)
    whole = answers(shape, x, router, *experts)
    parts = [answers(shape, x, router, *(one[first : first + 1] for one in experts), first) for first in range(4)]
    assert all(float(jnp.abs(part).max()) > 0 for part in parts)
    assert float(jnp.abs(sum(parts) - whole).max()) <= 1e-6 * float(jnp.abs(whole).max())


def test_each_part_of_a_pack_has_the_trained_positions_of_its_tokens():
    pack = random_pack((300, 400, 200))
    one, four = (side_by_side([pack, pack], Sizes.of(1024, parts=parts)) for parts in (1, 4))
    assert four.rows.shape == (8, CHUNK) and int(four.chunks) == 1
    trained = one.weights[0] != 0
    starts = np.repeat(np.arange(4) * CHUNK, CHUNK).reshape(4, CHUNK)
    for mine in (four.weights[:4] != 0, four.weights[4:] != 0):
        assert np.array_equal((four.rows[:4] + starts)[mine], one.rows[0][trained])
        assert np.array_equal(four.targets[:4][mine], one.targets[0][trained])


def test_the_losses_of_parts_go_to_the_source_of_their_tokens():
    class Store:
        source_index = np.array([0, 1, 0])

    pack = random_pack((300, 400, 200))
    found = []
    for parts in (1, 4):
        arrays = side_by_side([pack], Sizes.of(1024, parts=parts))
        losses_BN = arrays.targets * arrays.weights
        sums = BySource(["a", "b"], Store(), parts=parts)  # type: ignore[arg-type]
        sums.add([pack], losses_BN)
        found.append(sums.means())
    assert found[0] == pytest.approx(found[1]) and len(found[0]) == 2


def test_axes_have_the_lengths_that_the_recipe_gives():
    asked = Parallelism(data_parallel_shard_degree=-1, expert_parallel_degree=2, tensor_parallel_degree=2)
    assert axes_of(asked, 16) == {"dp": 1, "fsdp": 4, "ep": 2, "tp": 2, "sp": 1}
    assert axes_of(Parallelism(context_parallel_degree=-1), 8)["sp"] == 8
    with pytest.raises(RecipeError, match=r"expert_parallel_degree: 3, but data_parallel_shard_degree is 8"):
        axes_of(Parallelism(data_parallel_shard_degree=8, expert_parallel_degree=3), 8)


def test_degrees_that_do_not_multiply_to_the_devices_are_refused(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError, match=r"data_parallel_replicate_degree 3 x .* must .*devices of all processes"):
        train(
            tiny_model_folder, chat_file, tmp_path / "run", backend="jax",
            parallelism={"data_parallel_replicate_degree": 3},
        )  # fmt: skip


def test_a_model_without_experts_cannot_deal_them_out(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError, match=r"expert_parallel_degree: 2, but .* has no experts. Write 1."):
        train(
            tiny_model_folder, chat_file, tmp_path / "run", backend="jax",
            parallelism={"data_parallel_shard_degree": 2, "expert_parallel_degree": 2},
        )  # fmt: skip
