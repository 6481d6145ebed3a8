"""OSFT: the curves of the torch engine, updates that stay out of the protected space, and a resume to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.invariants.run import train
from training_hub.errors import CheckpointError, RecipeError, TrainingError


def asked(backend: str, **more) -> dict:
    return {
        "algorithm": "osft",
        "backend": backend,
        "osft": {"unfreeze_rank_ratio": 0.5, "cache": False},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "training": {"steps": 20, "preflight": False},
        "checkpoint": {"interval": 5},
        **more,
    }


@pytest.fixture(scope="module")
def learned(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("osft") / "run", **asked("jax"))


@pytest.mark.slow
def test_twenty_steps_have_the_losses_of_the_torch_engine(learned, tiny_model_folder, chat_file, tmp_path):
    """The first loss to 1e-5, all to 1e-4, in float32, with weight decay; the torch engine works on dense gradients."""
    theirs = train(tiny_model_folder, chat_file, tmp_path / "torch", **asked("torch"))
    losses = np.array([[row["loss"] for row in one.history] for one in (learned, theirs)])
    norms = np.array([[row["grad_norm"] for row in one.history] for one in (learned, theirs)])
    assert abs(losses[0] - losses[1])[0] <= 1e-5 and abs(losses[0] - losses[1]).max() <= 1e-4
    assert np.allclose(norms[0], norms[1], rtol=1e-3)


@pytest.mark.slow
def test_updates_stay_out_of_the_protected_directions(learned, tiny_model_folder):
    """Of each update at most 1e-4 lies in the protected space, in float32; its size is not nothing."""
    before = load_file(tiny_model_folder / "model.safetensors")
    after = load_file(learned.model_path / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        key = f"model.layers.1.{name}.weight"
        moved = (after[key] - before[key]).astype(np.float64)
        u, _, v = np.linalg.svd(before[key].astype(np.float64), full_matrices=False)
        kept = min(before[key].shape) // 2
        size = np.linalg.norm(moved)
        assert size > 1e-3
        assert np.linalg.norm(u[:, :kept].T @ moved) <= 1e-4 * size
        assert np.linalg.norm(moved @ v[:kept].T) <= 1e-4 * size


@pytest.mark.slow
def test_a_run_that_fails_goes_on_to_the_same_bits(learned, tiny_model_folder, chat_file, tmp_path):
    def stop(report) -> None:
        if report.step == 13:
            raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError):
        train(tiny_model_folder, chat_file, tmp_path / "run", [stop], **asked("jax"))
    with pytest.raises(CheckpointError, match="backend: was jax, now torch; a run of osft goes on in the engine"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **asked("torch"))
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **asked("jax"))
    first, second = (load_file(one.model_path / "model.safetensors") for one in (resumed, learned))
    assert all(first[key].tobytes() == second[key].tobytes() for key in second)


def test_what_this_osft_does_not_do_is_refused_together(tiny_model_folder, chat_file, tmp_path):
    more = {"unfreeze_rank_ratio": None, "energy": 0.9, "form": "core", "carry": True}
    with pytest.raises(RecipeError) as caught:
        train(tiny_model_folder, chat_file, tmp_path / "run", **asked("jax", osft=more))
    assert all(f"osft.{name}" in str(caught.value) for name in ("energy", "form", "carry"))
