"""The documented interface of training_hub 0.1.0, page "SFT Algorithm Usage Examples": each of its examples, here.

Names, parameters and defaults are the page's. Paths and sizes are small ones.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from training_hub import AlgorithmRegistry, create_algorithm, sft


@pytest.fixture
def paths(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, str]:
    """The three required parameters."""
    return {"model_path": str(tiny_model_folder), "data_path": str(chat_file), "ckpt_output_dir": str(tmp_path / "out")}


def final_model(result: Any) -> Path:
    assert result.status == "finished"
    assert (result.model_path / "model.safetensors").is_file()
    return result.model_path


def test_the_three_required_parameters_are_enough(paths: dict[str, str]):
    result = sft(**paths)
    final_model(result)
    assert [line["step"] for line in result.history] == [1], "3840 samples per step, one epoch: one step"
    assert Path(paths["ckpt_output_dir"]) in result.model_path.parents


def test_custom_parameters_are_followed(paths: dict[str, str]):
    result = sft(**paths, num_epochs=3, learning_rate=1e-5, effective_batch_size=32, max_seq_len=256)
    final_model(result)
    assert [line["step"] for line in result.history] == [1, 2, 3, 4, 5, 6]
    assert max(line["learning_rate"] for line in result.history) == pytest.approx(1e-5)


def test_the_backend_can_be_named_and_the_engine_that_ran_is_told(paths: dict[str, str]):
    result = sft(**paths, backend="instructlab-training")
    final_model(result)
    assert result.engine == "torch"


def test_the_factory_makes_an_instance_that_trains(paths: dict[str, str]):
    sft_algorithm = create_algorithm("sft", "instructlab-training")
    result = sft_algorithm.train(**paths, num_epochs=2, learning_rate=2e-6)
    final_model(result)
    assert [line["step"] for line in result.history] == [1, 2]


def test_required_parameters_can_be_asked_for():
    required = create_algorithm("sft", "instructlab-training").get_required_params()
    assert list(required.keys()) == ["model_path", "data_path", "ckpt_output_dir"]


def test_algorithms_and_backends_can_be_listed():
    assert "sft" in AlgorithmRegistry.list_algorithms()
    backends = AlgorithmRegistry.list_backends("sft")
    assert backends[0] == "instructlab-training", "the documented default comes first"


def test_the_class_of_an_algorithm_can_be_had():
    algorithm = AlgorithmRegistry.get_algorithm("sft")
    assert inspect.isclass(algorithm)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("num_epochs", 1),
        ("effective_batch_size", 3840),
        ("learning_rate", 2e-6),
        ("max_seq_len", 4096),
        ("max_batch_len", 60000),
    ],
)
def test_optional_parameters_and_their_documented_defaults(name: str, default: float, paths: dict[str, str]):
    said = create_algorithm("sft", "instructlab-training").get_optional_params()
    assert name in said
    unsaid = sft(**paths)
    spelled_out = sft(**{**paths, "ckpt_output_dir": paths["ckpt_output_dir"] + "-2"}, **{name: default})
    assert [_result_of(line) for line in unsaid.history] == [_result_of(line) for line in spelled_out.history]
    assert unsaid.plan == spelled_out.plan


def _result_of(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("step", "epoch", "loss", "learning_rate", "grad_norm", "trained_tokens"))


@pytest.mark.parametrize("missing", ["model_path", "data_path", "ckpt_output_dir"])
def test_a_missing_required_parameter_is_a_value_error_that_names_it(missing: str, paths: dict[str, str]):
    del paths[missing]
    with pytest.raises((ValueError, TypeError), match=missing):
        sft(**paths)


def test_paths_that_do_not_exist_are_reported_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere"):
        sft(
            model_path=str(tmp_path / "nowhere" / "model"),
            data_path=str(tmp_path / "nowhere" / "data.jsonl"),
            ckpt_output_dir=str(tmp_path / "out"),
        )


def test_an_unknown_backend_is_a_value_error_that_names_it(paths: dict[str, str]):
    with pytest.raises(ValueError, match="unheard-of"):
        sft(**paths, backend="unheard-of")


def test_an_unknown_parameter_is_an_error_that_names_the_nearest(paths: dict[str, str]):
    with pytest.raises((ValueError, TypeError), match="learning_rate"):
        sft(**paths, learning_rat=1e-5)


def test_whether_a_name_exists_can_be_asked_before_it_is_used():
    assert "instructlab-training" in AlgorithmRegistry.list_backends("sft")
    assert "sftt" not in AlgorithmRegistry.list_algorithms()
    assert AlgorithmRegistry.list_backends("sftt") == []
    with pytest.raises(ValueError, match="sftt"):
        AlgorithmRegistry.get_algorithm("sftt")


def test_the_parameters_of_one_process_are_accepted(paths: dict[str, str]):
    result = sft(**paths, nproc_per_node=1, nnodes=1, node_rank=0, rdzv_id=12345, rdzv_endpoint="")
    final_model(result)


def test_two_processes_on_one_node_find_the_numbers_of_one(paths: dict[str, str]):
    """The page's torchrun parameters, with two processes for its two GPUs."""
    alone = sft(**paths, effective_batch_size=16)
    together = {**paths, "ckpt_output_dir": paths["ckpt_output_dir"] + "-2"}
    layout = {"nproc_per_node": 2, "nnodes": 1, "node_rank": 0, "rdzv_id": 12345, "rdzv_endpoint": ""}
    result = sft(**together, effective_batch_size=16, **layout)
    final_model(result)
    assert result.plan["processes"] == 2
    for one, other in zip(alone.history, result.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2), "bfloat16 where the processor has it"
        assert other["trained_tokens"] == one["trained_tokens"]
    logs = Path(together["ckpt_output_dir"]) / "logs"
    assert {path.name for path in logs.glob("*.log")} == {"rank0.log", "rank1.log"}


def test_nodes_without_a_place_to_meet_are_refused_in_words_of_the_caller(paths: dict[str, str]):
    with pytest.raises(ValueError, match=r"nnodes.*rdzv_endpoint"):
        sft(**paths, nproc_per_node=4, nnodes=2, node_rank=1, rdzv_id=12345)
    assert not Path(paths["ckpt_output_dir"]).exists(), "refused before anything was made"
