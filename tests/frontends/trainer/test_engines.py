"""SFTTrainer on either engine: the same losses, callbacks, sets and files, whichever names it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.conftest import CONVERSATIONS
from training_hub import AutoEasyDeLModelForCausalLM, RecipeError, SFTConfig, SFTTrainer
from training_hub.backends import BUILT_IN

pytestmark = pytest.mark.skipif(
    "jax" not in BUILT_IN or not find_spec("jax") or not find_spec("optax"), reason="there is one engine here"
)
PAIRS = [{"instruction": f"Add 1 to {n}.", "response": f"{n + 1}."} for n in range(12)]


class Enough:
    stop_reason = ""

    def __call__(self, report: Any) -> None:
        self.stop_reason = "enough" if report.step == 4 else ""


def train(folder: Path, name: str, handle: Any, **fields: Any) -> SFTTrainer:
    trainer = SFTTrainer(
        arguments=SFTConfig(
            model_name=name, total_batch_size=4, learning_rate=1e-3, evaluation_steps=2, packing=True,
            num_train_epochs=2, unfreeze_interval=2, unfrozen_blocks=1, save_steps=2,
            overrides={"model.dtype": "float32", "data.cache": False, "monitoring.console": "off"}, **fields,
        ),
        model=handle, train_dataset=PAIRS, callbacks=[Enough()],
        eval_dataset={"talk": list(CONVERSATIONS[:3]), "sums": PAIRS[:3]},
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.slow
def test_both_engines_train_measure_and_end_alike(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    load = AutoEasyDeLModelForCausalLM.from_pretrained
    torch, jax = (
        train(tmp_path, "torch", load(tiny_model_folder)),
        train(tmp_path, "jax", load(tiny_model_folder, backend="jax")),
    )
    by_field = SFTTrainer(arguments=SFTConfig(backend="jax"), model=str(tiny_model_folder), train_dataset=PAIRS)
    assert by_field.recipe.backend == jax.recipe.backend == "jax"
    results = [one.train().result for one in (torch, jax)]  # they are over, and taken as they are
    assert [one.engine for one in results] == ["torch", "jax"]
    assert [(one.status, one.reason) for one in results] == [("stopped", "enough")] * 2
    lower = "model.layers.0.mlp.down_proj.weight"  # its turn comes with step 3, and the runs end after 4
    before = load_file(tiny_model_folder / "model.safetensors")[lower]
    for one in results:
        assert (load_file(one.checkpoints[0] / "model.safetensors")[lower] == before).all()
        assert not (load_file(one.model_path / "model.safetensors")[lower] == before).all()
    for ours, theirs in zip(*(one.history for one in results), strict=True):
        for name in ("loss", "validation_loss", "validation_loss/talk", "validation_loss/sums"):
            if ours.get(name) is not None:
                # Two libraries' float32 over four steps of AdamW at 1e-3.
                assert theirs[name] == pytest.approx(ours[name], abs=1e-4)
    measured = [one.evaluate() for one in (torch, jax)]
    assert measured[1] == pytest.approx(measured[0], rel=1e-3)
    jax.save_model("saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_format_of_numbers_may_be_jaxs(tiny_model_folder: Path):
    from jax import numpy as jnp

    load = AutoEasyDeLModelForCausalLM.from_pretrained
    handle = load(tiny_model_folder, dtype=jnp.bfloat16, param_dtype=jnp.dtype("float32"))
    assert (handle.settings["model.dtype"], handle.settings["model.save_dtype"]) == ("bfloat16", "float32")


def test_a_model_in_memory_is_torchs(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(
        arguments=SFTConfig(backend="jax"), model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
        train_dataset=PAIRS, processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
    )  # fmt: skip
    with pytest.raises(RecipeError, match="a live model is one of torch"):
        trainer.train()
