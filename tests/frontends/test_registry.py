"""Algorithms and backends by name, with the errors that users of training_hub match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_hub import (
    Algorithm,
    AlgorithmRegistry,
    Backend,
    InstructLabTrainingSFTBackend,
    SFTAlgorithm,
    TrainResult,
    create_algorithm,
)


class Echo(Backend):
    """Returns the parameters it was given."""

    def execute_training(self, algorithm_params: dict[str, Any]) -> Any:
        return algorithm_params


class Mine(Algorithm):
    """An algorithm that only asks its backend."""

    def train(self, **keywords: Any) -> Any:
        return self.backend.execute_training({**self.keywords, **keywords})

    def get_required_params(self) -> dict[str, type]:
        return {"x": int}

    def get_optional_params(self) -> dict[str, type]:
        return {}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(AlgorithmRegistry, "_algorithms", dict(AlgorithmRegistry._algorithms))
    monkeypatch.setattr(AlgorithmRegistry, "_backends", {})


def test_sft_and_its_backends_are_listed_by_preference():
    assert AlgorithmRegistry.list_algorithms() == ["sft", "osft", "lora_sft"]
    assert AlgorithmRegistry.list_backends("sft")[:3] == ["instructlab-training", "torch", "jax"]
    assert AlgorithmRegistry.list_backends("nothing") == []
    assert AlgorithmRegistry.get_algorithm("sft") is SFTAlgorithm
    assert AlgorithmRegistry.get_backend("sft", "instructlab-training") is InstructLabTrainingSFTBackend


def test_required_and_optional_parameters_of_sft():
    algorithm = create_algorithm("sft", "instructlab-training")
    assert algorithm.get_required_params() == {"model_path": str, "data_path": str, "ckpt_output_dir": str}
    optional = algorithm.get_optional_params()
    expected = {
        "num_epochs": int,
        "effective_batch_size": int,
        "learning_rate": float,
        "max_seq_len": int,
        "max_batch_len": int,
        "nproc_per_node": int,
        "nnodes": int,
        "node_rank": int,
        "rdzv_id": int,
        "rdzv_endpoint": str,
        "checkpoint_at_epoch": bool,
        "lr_scheduler_kwargs": dict,
        "callbacks": list,
    }
    assert {name: optional[name] for name in expected} == expected


def test_the_first_backend_is_taken_where_none_is_named():
    assert isinstance(create_algorithm("sft").backend, InstructLabTrainingSFTBackend)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: AlgorithmRegistry.get_algorithm("a"), "Algorithm 'a' not found"),
        (lambda: AlgorithmRegistry.get_backend("a", "b"), "Algorithm 'a' not found"),
        (lambda: create_algorithm("a"), "Algorithm 'a' not found"),
        (lambda: AlgorithmRegistry.get_backend("sft", "b"), "Backend 'b' not found for algorithm 'sft'"),
        (lambda: create_algorithm("sft", "b"), "Backend 'b' not found for algorithm 'sft'"),
        (
            lambda: AlgorithmRegistry.register_backend("a", "b", Echo),
            "Algorithm 'a' must be registered before registering backends",
        ),
    ],
)
def test_errors_are_value_errors_in_the_words_users_know(call: Any, text: str):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text


def test_an_algorithm_without_a_backend_cannot_be_made():
    AlgorithmRegistry.register_algorithm("mine", Mine)
    with pytest.raises(ValueError, match=r"^No backends available for algorithm 'mine'$"):
        create_algorithm("mine")


def test_an_algorithm_and_a_backend_of_ones_own():
    AlgorithmRegistry.register_algorithm("mine", Mine)
    AlgorithmRegistry.register_backend("mine", "echo", Echo)
    assert AlgorithmRegistry.list_algorithms() == ["sft", "osft", "lora_sft", "mine"]
    assert AlgorithmRegistry.list_backends("mine") == ["echo"]
    assert create_algorithm("mine", x=1).train(y=2) == {"x": 1, "y": 2}


def test_a_backend_of_ones_own_for_sft():
    AlgorithmRegistry.register_backend("sft", "echo", Echo)
    assert AlgorithmRegistry.list_backends("sft")[:4] == ["instructlab-training", "torch", "jax", "echo"]
    algorithm = create_algorithm("sft", "echo", num_epochs=2)
    assert algorithm.train(model_path="m", learning_rate=None) == {"num_epochs": 2, "model_path": "m"}


def test_a_class_that_cannot_train_is_no_backend():
    with pytest.raises(ValueError, match="has no method execute_training"):
        AlgorithmRegistry.register_backend("sft", "none", object)  # type: ignore[arg-type]


def test_algorithms_and_backends_are_abstract():
    for abstract in (Algorithm, Backend):
        with pytest.raises(TypeError, match="abstract"):
            abstract()


def test_an_installed_algorithm_is_found(installed: Path):
    assert AlgorithmRegistry.list_algorithms() == ["sft", "osft", "lora_sft", "guessing"]
    assert AlgorithmRegistry.list_backends("guessing") == ["guess"]
    assert create_algorithm("guessing").train(x=1) == ("guessed", {"x": 1})


def test_an_installed_engine_is_a_backend_of_sft(installed: Path, tmp_path: Path):
    assert AlgorithmRegistry.list_backends("sft") == ["instructlab-training", "torch", "jax", "recorder"]
    algorithm = create_algorithm("sft", "recorder")
    result = algorithm.train(model_path="m", data_path="d", ckpt_output_dir=tmp_path / "out", max_steps=3)
    assert isinstance(result, TrainResult)
    assert result.plan["recipe"]["backend"] == "recorder"
    assert result.plan["recipe"]["training"]["steps"] == 3


def test_what_is_missing_is_asked_for_by_its_keyword():
    with pytest.raises(ValueError) as caught:
        create_algorithm("sft").train()
    assert str(caught.value).splitlines()[1:] == [
        "  - output (ckpt_output_dir): not given. Write ckpt_output_dir='OUTPUT_FOLDER'",
        "  - model.path (model_path): not given. Write model_path='MODEL_FOLDER'",
        "  - data.path (data_path): not given. Write data_path='FILE.jsonl'",
    ]
