"""The documented interface of training_hub 0.1.0, page "OSFT Algorithm Usage Examples": each of its examples, here.

Names, parameters and defaults are the page's. Paths and sizes are small ones.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from training_hub import AlgorithmRegistry, create_algorithm, osft

REQUIRED = (
    "model_path",
    "data_path",
    "ckpt_output_dir",
    "unfreeze_rank_ratio",
    "effective_batch_size",
    "max_tokens_per_gpu",
    "max_seq_len",
    "learning_rate",
)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def basic(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    """The page's first call."""
    return {
        "model_path": str(tiny_model_folder),
        "data_path": str(chat_file),
        "ckpt_output_dir": str(tmp_path / "out"),
        "unfreeze_rank_ratio": 0.3,
        "effective_batch_size": 16,
        "max_tokens_per_gpu": 2048,
        "max_seq_len": 2048,
        "learning_rate": 2e-5,
    }


def rows_of(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def final_model(result: Any) -> Path:
    assert result.status == "finished"
    assert (result.model_path / "model.safetensors").is_file()
    return result.model_path


def trained_tokens(result: Any) -> int:
    return result.plan["trained_tokens"]


def test_basic_osft_training(basic: dict[str, Any]):
    result = osft(**basic)
    final_model(result)
    assert [line["step"] for line in result.history] == [1, 2, 3, 4], "64 samples, 16 per step, one epoch"
    assert max(line["learning_rate"] for line in result.history) == 2e-5
    assert all(line["osft_leak"] <= 1e-6 for line in result.history)
    assert result.checkpoints == (), "checkpoint_at_epoch is off, save_final_checkpoint is on"


def test_osft_training_with_custom_parameters(basic: dict[str, Any]):
    custom = {
        "unfreeze_rank_ratio": 0.2,
        "max_tokens_per_gpu": 4096,
        "max_seq_len": 4096,
        "learning_rate": 1e-5,
        "num_epochs": 3,
        "warmup_steps": 100,
        "use_liger": True,
        "osft_memory_efficient_init": True,
        "seed": 42,
    }
    result = osft(**{**basic, **custom})
    final_model(result)
    assert len(result.history) == 12
    assert max(line["learning_rate"] for line in result.history) < 1e-5, "still warming up"


def test_the_factory_takes_batch_size_and_says_what_is_required(basic: dict[str, Any]):
    osft_algo = create_algorithm("osft", "mini-trainer")
    changed = {
        "unfreeze_rank_ratio": 0.25,
        "max_tokens_per_gpu": 3072,
        "learning_rate": 1.5e-5,
        "batch_size": 6,
        "num_epochs": 2,
    }
    del basic["effective_batch_size"]
    result = osft_algo.train(**{**basic, **changed})
    final_model(result)
    assert len(result.history) == 22, "64 samples in steps of 6, twice"
    required_params = osft_algo.get_required_params()
    assert sorted(required_params) == sorted(REQUIRED)
    assert required_params["unfreeze_rank_ratio"] is float


def test_algorithms_and_backends_can_be_listed():
    assert AlgorithmRegistry.list_algorithms()[:2] == ["sft", "osft"]
    assert AlgorithmRegistry.list_backends("osft")[0] == "mini-trainer"
    assert inspect.isclass(AlgorithmRegistry.get_algorithm("osft"))


@pytest.mark.parametrize(
    "name",
    [
        "target_patterns",
        "use_processed_dataset",
        "unmask_messages",
        "num_epochs",
        "seed",
        "use_liger",
        "osft_memory_efficient_init",
        "lr_scheduler",
        "warmup_steps",
        "lr_scheduler_kwargs",
        "checkpoint_at_epoch",
        "save_final_checkpoint",
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "rdzv_id",
        "rdzv_endpoint",
    ],
)
def test_every_optional_parameter_of_the_page_is_one(name: str):
    assert name in create_algorithm("osft", "mini-trainer").get_optional_params()
    assert name in inspect.signature(osft).parameters


def test_the_first_parameters_have_the_order_of_the_package(basic: dict[str, Any]):
    names = ["model_path", "data_path", "unfreeze_rank_ratio", "effective_batch_size", "max_tokens_per_gpu"]
    names += ["max_seq_len", "learning_rate", "ckpt_output_dir"]
    final_model(osft(*(basic[name] for name in names)))


def test_messages_with_every_documented_role_and_reasoning(basic: dict[str, Any], tmp_path: Path):
    basic["data_path"] = rows_of(
        tmp_path / "roles.jsonl",
        [
            {
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": "Hello!"},
                    {"role": "assistant", "content": "Hi there!", "reasoning_content": "A greeting."},
                ]
            },
            {"messages": [{"role": "pretraining", "content": "OSFT stands for Orthogonal Subspace Fine-Tuning."}]},
        ]
        * 8,
    )
    final_model(osft(**basic))


def test_unmask_messages_trains_all_but_system(basic: dict[str, Any], tmp_path: Path):
    masked = osft(**basic, unmask_messages=False)
    unmasked = osft(**{**basic, "ckpt_output_dir": str(tmp_path / "unmasked")}, unmask_messages=True)
    assert trained_tokens(masked) < trained_tokens(unmasked) < unmasked.plan["tokens"]


def test_a_processed_dataset(basic: dict[str, Any], tmp_path: Path):
    rows = [{"input_ids": list(range(5, 25)), "labels": [-100] * 10 + list(range(15, 25))} for _ in range(32)]
    basic["data_path"] = rows_of(tmp_path / "tokens.jsonl", rows)
    result = osft(**basic, use_processed_dataset=True)
    final_model(result)
    assert trained_tokens(result) == 320


def test_target_patterns_choose_what_is_protected(basic: dict[str, Any]):
    result = osft(**basic, target_patterns=["q_proj", "mlp.down_proj"])
    final_model(result)
    with pytest.raises(ValueError, match="no_such_proj"):
        osft(**{**basic, "ckpt_output_dir": basic["ckpt_output_dir"] + "-2"}, target_patterns=["no_such_proj"])


def test_the_schedule_and_its_arguments(basic: dict[str, Any]):
    result = osft(**basic, lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": "1e-5"}, warmup_steps=0)
    rates = [line["learning_rate"] for line in result.history]
    assert rates[0] == 2e-5
    assert 1e-5 < rates[-1] < 1.5e-5


def test_optimizer_settings_arrive(basic: dict[str, Any], tmp_path: Path):
    plain = osft(**basic, num_epochs=2)
    last = [plain.history[-1]["loss"]]
    for name, value in (("beta1", 0.5), ("beta2", 0.5), ("eps", 1e-3), ("weight_decay", 10.0)):
        other = osft(**{**basic, "ckpt_output_dir": str(tmp_path / name)}, num_epochs=2, **{name: value})
        last.append(other.history[-1]["loss"])
    assert len(set(last)) == len(last)


def test_checkpoints_at_epochs_and_no_final_model(basic: dict[str, Any]):
    result = osft(**basic, num_epochs=2, checkpoint_at_epoch=True, save_final_checkpoint=False)
    assert [path.name for path in result.checkpoints] == ["step-4", "step-8"]
    assert result.model_path is None


def test_one_process_may_be_spelled_out(basic: dict[str, Any]):
    final_model(osft(**basic, nproc_per_node=1, nnodes=1, node_rank=0, rdzv_id=12345, rdzv_endpoint=""))


@pytest.mark.slow
def test_two_nodes_train_together(basic: dict[str, Any], tmp_path: Path):
    """The page's multi-node parameters, with both nodes here and a process on each; the second runs its own call."""
    layout = {"nproc_per_node": 1, "nnodes": 2, "rdzv_id": 12345, "rdzv_endpoint": f"127.0.0.1:{free_port()}"}
    basic |= {"effective_batch_size": 32}
    settings = {**basic, **layout, "node_rank": 1}
    call = f"from training_hub import osft; print(osft(**{settings!r}).status)"
    second = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True)
    result = osft(**basic, **layout, node_rank=0)
    final_model(result)
    assert result.plan["processes"] == 2
    assert len(result.history) == 2
    assert second.communicate(timeout=300)[0].splitlines()[-1] == "finished"


def test_paths_that_do_not_exist_are_a_value_error(basic: dict[str, Any]):
    wrong = {"model_path": "/valid/model/path", "data_path": "/valid/data/path", "ckpt_output_dir": "/valid/output"}
    with pytest.raises(ValueError, match="/valid/model/path"):
        osft(**{**basic, **wrong, "ckpt_output_dir": basic["ckpt_output_dir"]})


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_out_of_range_is_a_value_error(ratio: float, basic: dict[str, Any]):
    with pytest.raises(ValueError, match="unfreeze_rank_ratio"):
        osft(**{**basic, "unfreeze_rank_ratio": ratio})


@pytest.mark.parametrize("ratio", [0, 1, 0.5])
def test_the_ends_of_the_range_are_allowed_also_as_whole_numbers(ratio: float, basic: dict[str, Any]):
    final_model(osft(**{**basic, "unfreeze_rank_ratio": ratio}))


def test_everything_that_is_missing_is_said_at_once(basic: dict[str, Any]):
    with pytest.raises(ValueError, match="not given") as caught:
        osft(basic["model_path"], basic["data_path"])
    for name in REQUIRED[2:]:
        assert name in str(caught.value)


def test_an_unknown_parameter_is_an_error_that_names_the_nearest(basic: dict[str, Any]):
    with pytest.raises(ValueError, match=r"osft\(\) has no parameter 'unfreeze_ratio'.*unfreeze_rank_ratio"):
        osft(**basic, unfreeze_ratio=0.3)


def test_sft_has_none_of_the_parameters_of_osft(basic: dict[str, Any]):
    from training_hub import sft

    with pytest.raises(ValueError, match=r"sft\(\) has no parameter 'unfreeze_rank_ratio'"):
        sft(**basic)


def test_whether_a_name_exists_can_be_asked_before_it_is_used():
    assert "osft" in AlgorithmRegistry.list_algorithms()
    assert "mini-trainer" in AlgorithmRegistry.list_backends("osft")
