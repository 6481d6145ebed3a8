"""Where JAX is not installed, the engine says what to write, before anything is read."""

from __future__ import annotations

import sys

import pytest

from tests.imports import modules
from tests.invariants.run import train
from training_hub.errors import RecipeError


def test_jax_is_here_to_be_tested():
    pytest.importorskip("jax", reason="the jax engine is not tested: pip install 'training-hub[jax]'")
    pytest.importorskip("optax", reason="the jax engine is not tested: pip install 'training-hub[jax]'")


def test_without_jax_the_error_says_what_to_install(tiny_model_folder, chat_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(
        RecipeError, match=r"needs jax and optax, not installed here: pip install 'training-hub\[jax\]'"
    ):
        train(tiny_model_folder, chat_file, tmp_path / "run", backend="jax")
    assert not (tmp_path / "run").exists()


def test_what_refuses_a_run_is_loaded_without_jax():
    reached, ahead = set(), ["training_hub.backends.jax_engine.engine"]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead += [
            found.module
            for found in modules()[name].imports
            if found.is_at_top and found.module in modules() and found.module not in reached
        ]
    libraries = {found.module.split(".")[0] for name in reached for found in modules()[name].imports if found.is_at_top}
    assert "training_hub.backends.jax_engine.lora" in reached
    assert not libraries & {"jax", "jaxlib", "optax", "ml_dtypes"}
