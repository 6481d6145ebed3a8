"""plan, check and eval by the jax engine: the numbers of a run before the run, of the torch engine, and of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.jax_engine.tiny import read, saved
from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import recipe, train
from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.full import Adaptation, Full
from training_hub.backends.jax_engine.lora import LowRank
from training_hub.backends.jax_engine.osft import Spaces
from training_hub.backends.jax_engine.work import operations
from training_hub.backends.torch_engine.planning.work import work_of
from training_hub.frontends.cli import main
from training_hub.monitoring.console import open_console
from training_hub.recipe.freezing import Freezing

QUIET = ("--no-data.cache", "--monitoring.console", "off", "--model.dtype", "float32")
OURS = ("memory_gib", "engine", "devices", "slices", "split_among", "exchanged_gib_per_step", "quantization")
"""What the two engines' plans do not have in common: what takes memory, and how processes are laid out."""


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_plan_is_that_of_the_run_and_of_the_torch_engine(tiny_model_folder, chat_file, tmp_path, capsys):
    """Made from config and tokenizer alone; only memory is each engine's own."""
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--data", str(chat_file), "--steps", "3", "--batch-size", "5", *QUIET]
    plan = said(capsys, "plan", "--backend", "jax", "--model", str(folder), *words)
    run = train(
        tiny_model_folder, chat_file, tmp_path / "run", backend="jax",
        training={"steps": 3, "global_batch_size": 5, "max_seq_len": 4096, "preflight": False},
    )  # fmt: skip
    assert plan == json.loads((tmp_path / "run" / "plan.json").read_text())
    theirs = said(capsys, "plan", "--backend", "torch", "--model", str(folder), *words)
    assert plan.keys() - {*OURS} == theirs.keys() - {*OURS}
    # By length of a pack, of which each engine prefers one.
    same = {name for name in theirs if name not in (*OURS, "activation_checkpointing")}
    assert {name: plan[name] for name in same} == {name: theirs[name] for name in same}
    memory = plan["memory_gib"]
    parameters = plan["parameters"]
    assert memory["weights"] * 2**30 == memory["gradients"] * 2**30 == 4 * parameters
    assert memory["optimizer"] * 2**30 == 8 * parameters
    assert memory["activations"] > 0 and memory["total"] > memory["libraries"]
    assert run.plan["total_steps"] == 3


@pytest.mark.slow
def test_a_plan_in_words_and_with_a_bound_on_time(tiny_model_folder, chat_file, capsys):
    words = ["plan", "--backend", "jax", "--model", str(tiny_model_folder), "--data", str(chat_file), "--steps", "2"]
    assert main([*words, *QUIET, "--rate", "measure"]) == 0
    told = capsys.readouterr().out
    assert "activations of the largest pack" in told and "2, " in told
    assert "a matrix product in float32 measured now on cpu" in told


def test_a_plan_of_what_the_engine_does_not_do_is_refused(tiny_model_folder, chat_file, capsys):
    words = ["plan", "--backend", "jax", "--model", str(tiny_model_folder), "--data", str(chat_file), "--training.fp8"]
    assert main([*words, *QUIET]) != 0
    assert "training.fp8: found True; backend jax" in capsys.readouterr().err


def _adaptations(folder: Path, chat_file: Path, dtype: str) -> list[Adaptation]:
    shape, _ = read(folder)
    console = open_console("off")
    lora = recipe(folder, chat_file, folder / "run", algorithm="lora_sft", lora={"r": 4})
    osft = recipe(folder, chat_file, folder / "run", algorithm="osft", osft={"unfreeze_rank_ratio": 0.4})
    freezing = Freezing(blocks=1, embeddings=True)
    return [Full(shape, folder, freezing, dtype), LowRank(lora, shape, dtype), Spaces(osft, shape, folder, console)]


@pytest.mark.parametrize("came, dtype", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_what_is_planned_to_be_held_is_what_is_held(came, dtype, tmp_path, chat_file):
    import torch

    saved("gemma", tmp_path, getattr(torch, came))
    shape, loaded = read(tmp_path)
    formats = files.formats(tmp_path, shape)
    assert formats == loaded.formats
    for adaptation in _adaptations(tmp_path, chat_file, dtype):
        trained, frozen = adaptation.split(loaded.weights)
        assert {name: one.shape for name, one in trained.items()} == adaptation.shapes()
        held = {name: (one.shape, one.dtype.name) for name, one in frozen.items()}
        assert held == adaptation.staying(formats)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "mixtral", "qwen3-moe"])
def test_the_work_of_a_token_is_what_the_torch_engine_counts(family, tmp_path):
    saved(family, tmp_path)
    shape, _ = read(tmp_path)
    theirs, model = work_of(tiny_model(family)), Full(shape, tmp_path)
    assert operations(shape, model.shapes()) == pytest.approx((theirs.per_token, theirs.per_trained_token))


@pytest.mark.slow
def test_check_tries_every_proof_and_trains_nothing(tiny_model_folder, chat_file, capsys):
    words = ["check", "--backend", "jax", "--model", str(tiny_model_folder), "--data", str(chat_file)]
    found = said(capsys, *words, *QUIET, "--batch-size", "8")
    assert found["holds"] and len(found["proofs"]) == 10
    assert {one["status"] for one in found["proofs"]} == {"holds"}
    text = next(one for one in found["proofs"] if one["name"] == "trained text is what the rows say")
    assert "0 of 64 rows differ" in text["measured"], "a run compares 32"


def test_the_loss_of_a_saved_model_is_what_the_torch_engine_measures(tiny_model_folder, chat_file, capsys):
    """To 1e-5, in float32: sums in another order."""
    words = ["eval", "--model", str(tiny_model_folder), "--data", str(chat_file), "--metrics", "loss", *QUIET]
    ours, theirs = (said(capsys, *words, "--backend", name)["model"] for name in ("jax", "torch"))
    assert ours.keys() == theirs.keys() and ours["rows"] == theirs["rows"] == 64
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ours["perplexity"] == pytest.approx(np.exp(ours["loss"]))


@pytest.mark.slow
def test_the_loss_of_an_adapter_is_measured_on_its_base(tiny_model_folder, chat_file, tmp_path, capsys):
    """To 1e-5 of the torch engine, in float32; the adapter says something else than the base."""
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    asked = {"algorithm": "lora_sft", "backend": "jax", "lora": lora, "optimizer": {"lr": 0.01}}
    run = train(tiny_model_folder, chat_file, tmp_path / "run", **asked, training={"steps": 5, "preflight": False})
    models = ["--model", str(tiny_model_folder), "--model", str(run.model_path)]
    words = ["eval", *models, "--data", str(chat_file), "--metrics", "loss", *QUIET]
    ours, theirs = (said(capsys, *words, "--backend", name) for name in ("jax", "torch"))
    assert ours.keys() == theirs.keys() == {"model", "final"}
    for name in ours:
        assert ours[name]["loss"] == pytest.approx(theirs[name]["loss"], abs=1e-5)
    assert ours["final"]["loss"] < ours["model"]["loss"] - 1e-3
