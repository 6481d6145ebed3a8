"""Names in a recipe choose among what is registered; none is looked up as Python would."""

from __future__ import annotations

from typing import Any

import pytest

from training_hub.backends import find_backend
from training_hub.errors import BackendError, RecipeError
from training_hub.frontends.registry import create_algorithm

NAMES = (
    *("os.system", "os:system", "builtins.eval", "__import__", "subprocess.Popen", "torch_engine", "torch.optim.SGD"),
    *("training_hub.backends.torch_engine.engine:TorchEngine", "../torch", "torch;touch x", "__class__", "", " torch"),
    *("lambda: 0", "{{7*7}}", "%s", "TORCH ", "torch\n", "torch\0", "none"),
)
CHOICES = (
    *("algorithm", "backend", "model.dtype", "model.attention", "model.save_dtype", "data.format", "data.turns"),
    *("data.overlong", "optimizer.name", "lr_scheduler.name", "monitoring.console", "checkpoint.resume"),
)


@pytest.mark.parametrize("path", CHOICES)
def test_no_other_name_resolves(path: str, watched: Any, words: Any, call: Any):
    with watched() as record:
        for name in NAMES[CHOICES.index(path) % 4 :: 4]:  # each name somewhere, each setting with several
            said = call(*words(f"{path}={name}"))
            assert said.code in (2, 3, 4), (path, name, said.text)
            assert record.programs == []
            assert record.network == []


@pytest.mark.parametrize("name", NAMES)
def test_engines_and_algorithms_are_found_by_name_only(name: str):
    with pytest.raises(BackendError, match="is not known"):
        find_backend(name)
    with pytest.raises(RecipeError, match="not found"):
        create_algorithm(name)
    with pytest.raises(RecipeError, match="not found"):
        create_algorithm("sft", name or "?")
