"""Whole runs: the numbers of the torch engine, the bits of an unbroken run, a model that transformers loads."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.jax_engine.tiny import saved
from tests.invariants.run import train
from training_hub.errors import CheckpointError, Interrupted, RecipeError, TrainingError

TWENTY = {"steps": 20, "preflight": False}
QUIET = {"interval": None, "minutes": None}
SLOW = pytest.mark.slow
"""Compiling takes seconds, and these are about what others show in part; `make test-jax` runs them."""


def losses(result) -> np.ndarray:
    return np.array([row["loss"] for row in result.history])


def weights(result) -> dict[str, np.ndarray]:
    return load_file(result.model_path / "model.safetensors")


def same_bits(one, other) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(first[key].tobytes() == second[key].tobytes() for key in first)


@pytest.fixture(scope="module")
def unbroken(tiny_model_folder, chat_file, tmp_path_factory):
    """A run with proofs, validation, a watch and checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    return train(tiny_model_folder, chat_file, output, **everything(chat_file))


def everything(chat_file) -> dict[str, dict]:
    return {
        "backend": "jax",
        "data": {"validation_fraction": 0.1},
        "training": {"steps": 8},
        "evaluation": {"watch": str(chat_file), "watch_interval": 4, "interval": 4},
        "checkpoint": {"interval": 2},
    }


class StopAt:
    """A callback that ends the run after a step, as a crash in user code would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, report) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


@pytest.fixture(scope="module")
def folders(tiny_model_folder, tmp_path_factory) -> dict[str, Path]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    found = {"llama": tiny_model_folder}
    for family in ("qwen3", "qwen3-moe"):
        found[family] = tmp_path_factory.mktemp(family)
        changes = {"vocab_size": len(tokenizer), "initializer_range": 0.02, "num_hidden_layers": 1}
        saved(family, found[family], **changes)
        tokenizer.save_pretrained(found[family])
    return found


@pytest.mark.parametrize("family", ["llama", *(pytest.param(one, marks=SLOW) for one in ("qwen3", "qwen3-moe"))])
def test_twenty_steps_have_the_losses_of_the_torch_engine(folders, family, chat_file, tmp_path):
    """The first loss to 1e-5, all to 1e-4, in float32: kernels sum in other orders, and steps carry that on."""
    ours, theirs = (
        train(folders[family], chat_file, tmp_path / name, backend=name, training=TWENTY, checkpoint=QUIET)
        for name in ("jax", "torch")
    )
    assert abs(losses(ours) - losses(theirs))[0] <= 1e-5
    assert abs(losses(ours) - losses(theirs)).max() <= 1e-4
    norms = np.array([[row["grad_norm"] for row in each.history] for each in (ours, theirs)])
    assert np.allclose(norms[0], norms[1], rtol=1e-3)
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    # AdamW moves a weight whose gradient is all rounding by a whole step in either direction.
    assert np.mean([np.abs(first[key] - second[key]).mean() for key in first]) <= 1e-5


def test_a_run_leaves_what_every_run_leaves(unbroken, tiny_model_folder):
    folder = unbroken.output_dir
    assert unbroken.engine == "jax" and unbroken.status == "finished"
    assert unbroken.versions["jax"] and "torch" not in unbroken.versions
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "plan.json", "preflight.json", "metrics.jsonl", "result.json", "report.html"}
    proofs = json.loads((folder / "preflight.json").read_text())["proofs"]
    assert len(proofs) == 10 and {proof["status"] for proof in proofs} == {"holds"}
    assert unbroken.metrics["validation_loss"] < unbroken.metrics["validation_loss_before"]
    assert unbroken.metrics["watch_drift"] < 0
    model = AutoModelForCausalLM.from_pretrained(unbroken.model_path)
    tokenizer = AutoTokenizer.from_pretrained(unbroken.model_path)
    assert tokenizer.chat_template and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (unbroken.model_path / "README.md").exists()
    own = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    assert model.state_dict().keys() == own.keys()


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=SLOW)])
def test_a_run_that_fails_goes_on_to_the_same_bits(tiny_model_folder, chat_file, tmp_path, unbroken, step):
    asked = everything(chat_file)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(step)], **asked)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **asked)
    assert same_bits(resumed, unbroken)
    assert losses(resumed).tolist() == losses(unbroken).tolist()


@SLOW
def test_a_signal_saves_at_the_step_boundary(tiny_model_folder, chat_file, tmp_path, unbroken):
    asked = {**everything(chat_file), "checkpoint": QUIET, "training": {"steps": 8, "preflight": False}}

    def asking(report) -> None:
        if report.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 3 of 8"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [asking], **asked)
    assert same_bits(train(tiny_model_folder, chat_file, tmp_path / "run", **asked), unbroken)


@SLOW
@pytest.mark.parametrize("first, then", [("jax", "torch"), ("torch", "jax")])
def test_either_engine_goes_on_from_what_the_other_saved(tiny_model_folder, chat_file, tmp_path, first, then):
    """To 1e-5 of the run that one engine made alone: the state is the other's, bit for bit, the rounding is not."""
    asked = {"training": {"steps": 8, "preflight": False}, "checkpoint": {"interval": 2, "minutes": None}}
    with pytest.raises(TrainingError):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(5)], backend=first, **asked)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", backend=then, **asked)
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", backend=then, **asked)
    assert resumed.engine == then
    assert abs(losses(resumed) - losses(alone)).max() <= 1e-5


@SLOW
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(tiny_model_folder, tmp_path):
    rows = [{"ids": [5, 6, 7], "weights": [0.0, 1.0, 1.0]}, {"ids": [5, 6, 7], "weights": [0.0, 1e38, 3e38]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": r["ids"], "weights": r["weights"]}) + "\n" for r in rows))
    with pytest.raises((TrainingError, RecipeError), match=r"not finite.*line 2") as caught:
        train(tiny_model_folder, path, tmp_path / "run", backend="jax", training={"steps": 1, "preflight": False})
    assert "line 1" not in str(caught.value)
    assert not (tmp_path / "run" / "final").exists()


@SLOW
def test_another_model_is_not_gone_on_with(folders, chat_file, tmp_path):
    asked = {"training": {"steps": 2, "preflight": False}, "checkpoint": {"interval": 1, "final": False}}
    with pytest.raises(TrainingError):
        train(folders["llama"], chat_file, tmp_path / "run", [StopAt(2)], backend="jax", **asked)
    config = folders["llama"] / "config.json"
    text = config.read_text()
    try:
        config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
        with pytest.raises(CheckpointError, match="rms_norm_eps"):
            train(folders["llama"], chat_file, tmp_path / "run", backend="jax", **asked)
    finally:
        config.write_text(text)


@SLOW
def test_bfloat16_keeps_float32_masters_and_the_format_that_the_model_came_in(chat_file, tiny_model_folder, tmp_path):
    saved("llama-tied", tmp_path / "model", torch.bfloat16, vocab_size=300, initializer_range=0.02, num_hidden_layers=1)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "model")
    asked = {
        "model": {"path": str(tmp_path / "model"), "dtype": "bfloat16"},
        "training": {"steps": 2, "preflight": False, "max_tokens_per_gpu": 256},
        "optimizer": {"lr": 1e-6},
        "checkpoint": {"interval": 2, "minutes": None},
    }
    result = train(tmp_path / "model", chat_file, tmp_path / "run", backend="jax", **asked)
    assert {array.dtype.name for array in weights(result).values()} == {"bfloat16"}
    masters = load_file(result.checkpoints[-1] / "model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert {array.dtype.name for array in masters.values()} == {"float32"}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (masters[name] != before[name].astype(np.float32)).mean() > 0.9


def test_compiling_is_not_to_be_asked_of_an_engine_that_always_does(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError, match=r"training\.compile: found True; backend jax: JAX compiles"):
        train(tiny_model_folder, chat_file, tmp_path / "run", backend="jax", training={"compile": True})


def test_what_the_engine_does_not_do_is_refused_at_once_in_words(tiny_model_folder, chat_file, tmp_path):
    asked = {
        "model": {"dtype": "float64"},
        "training": {"fp8": True},
        "optimizer": {"name": "GaLoreAdamW"},
        "monitoring": {"profile": True},
        "processes": {"procs": 2},
    }
    with pytest.raises(RecipeError) as caught:
        train(tiny_model_folder, chat_file, tmp_path / "run", backend="jax", **asked)
    told = str(caught.value)
    for name in ("model.dtype", "training.fp8", "optimizer.name", "monitoring.profile"):
        assert name in told
    assert not (tmp_path / "run").exists()
