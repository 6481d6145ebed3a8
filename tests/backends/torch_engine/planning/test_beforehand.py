"""What is known of a run before its weights are read is what it is once they are."""

from __future__ import annotations

import pytest
import torch

from tests.backends.torch_engine.tiny_models import FAMILIES, tiny_model
from tests.invariants.run import recipe
from training_hub.backends.shared.sameness import changed_facts, changed_shapes, model_facts
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.loading.model_config import read_blank_model


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_shapes_are_known_without_weights(family, chat_file, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "model")
    made = recipe(tmp_path / "model", chat_file, tmp_path / "run")
    blank, dtype = read_blank_model(made.model)
    loaded = load_model(made, torch.device("cpu"), torch.float32)
    assert model_facts(blank.config) == model_facts(loaded.model.config)
    assert dtype == loaded.original_dtype
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (blank, loaded.model)]
    assert shapes[0] == shapes[1]


def test_what_changed_is_named():
    before = {"data_fingerprint": "a", "tokenizer_fingerprint": "t", "model_config": {"size": 1, "gone": 2}}
    now = {"data_fingerprint": "b", "tokenizer_fingerprint": "t", "model_config": {"size": 3, "new": 4}}
    assert changed_facts(before, now) == ["data_fingerprint: was 'a', now 'b'", "model config.size: was 1, now 3"]
    assert changed_shapes({"w": (2, 3), "b": (2,)}, {"w": (2, 4)}) == [
        "weight b: was (2,), now not there",
        "weight w: was (2, 3), now (2, 4)",
    ]
