"""Adapters: PEFT loads what is written, and the torch engine learns the same from the same start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tests.backends.jax_engine.tiny import forward, read
from tests.invariants.run import train
from training_hub.backends.jax_engine.lora import LowRank
from training_hub.errors import RecipeError, TrainingError

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}


class StopAt:
    def __init__(self, step: int):
        self.step = step

    def __call__(self, report) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


def asked(backend: str, **more) -> dict:
    return {
        "algorithm": "lora_sft",
        "backend": backend,
        "lora": LORA,
        "training": {"steps": 20, "preflight": False},
        "checkpoint": {"interval": 10},
        **more,
    }


@pytest.fixture(scope="module")
def learned(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("lora") / "run", **asked("jax"))


def test_peft_loads_the_adapter_and_says_what_the_engine_says(learned, tiny_model_folder):
    """To 1e-5 of the largest logit, in float32; and the adapter has learned something."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    ids = torch.arange(20)[None]
    before = base(input_ids=ids).logits.detach().numpy()
    theirs = PeftModel.from_pretrained(base, learned.model_path)(input_ids=ids).logits.detach().numpy()
    shape, loaded = read(tiny_model_folder)
    adapter = LowRank(_recipe(learned, lora={"adapter": str(learned.model_path)}), shape, "float32")
    trained, frozen = adapter.split(loaded.weights)
    made = forward(shape)
    made = type(made)(type(made.build)(shape, made.build.attend, made.build.dtype, adapter.scale))
    numbers = np.arange(20, dtype=np.int32)[None]
    ours = np.asarray(made.logits({**frozen, **trained}, numbers, numbers, np.ones_like(numbers)))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - before).max() > 1e-3
    assert len(load_file(learned.model_path / "adapter_model.safetensors")) == 8


def _recipe(result, **changes):
    from training_hub.recipe.load import load_file as load_recipe

    found = load_recipe(result.output_dir / "recipe.yaml")
    return found.model_copy(update={"lora": found.lora.model_copy(update=changes["lora"])})


@pytest.mark.slow
def test_both_engines_learn_the_same_from_the_same_adapter(learned, tiny_model_folder, chat_file, tmp_path):
    """The first loss to 1e-5, all of twenty to 1e-4, in float32."""
    start = {"lora": {"adapter": str(learned.model_path)}}
    ours, theirs = (
        np.array(
            [
                row["loss"]
                for row in train(tiny_model_folder, chat_file, tmp_path / name, **asked(name, **start)).history
            ]
        )
        for name in ("jax", "torch")
    )
    assert abs(ours - theirs)[0] <= 1e-5 and abs(ours - theirs).max() <= 1e-4


@pytest.mark.slow
def test_the_torch_engine_goes_on_from_an_adapter_in_a_checkpoint(tiny_model_folder, chat_file, tmp_path, learned):
    """To 1e-5 of the run that the jax engine made alone: only rounding differs."""
    with pytest.raises(TrainingError):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(12)], **asked("jax"))
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **asked("torch"))
    assert [row["loss"] for row in resumed.history] == pytest.approx([row["loss"] for row in learned.history], abs=1e-5)


def test_a_target_that_is_not_there_is_refused_with_the_nearest(tiny_model_folder, chat_file, tmp_path):
    wrong = {**LORA, "target_modules": ["q_porj"]}
    with pytest.raises(RecipeError, match=r"'q_porj' matches no linear layer.*Did you mean q_proj\?"):
        train(tiny_model_folder, chat_file, tmp_path / "run", **asked("jax", lora=wrong))


def test_tuners_and_options_that_are_not_here_are_refused_together(tiny_model_folder, chat_file, tmp_path):
    wrong = {"tuner": "dora", "modules_to_save": ["lm_head"], "merge": True}
    with pytest.raises(RecipeError) as caught:
        train(tiny_model_folder, chat_file, tmp_path / "run", **asked("jax", lora=wrong))
    assert all(name in str(caught.value) for name in ("lora.tuner", "lora.modules_to_save", "lora.merge", "torch"))
