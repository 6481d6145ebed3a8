"""sft() as users of training_hub call it: names, order and defaults; it runs the recipe and returns the result."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from training_hub import AlgorithmRegistry, Backend, RecipeError, StepReport, TrainResult, sft
from training_hub.frontends.dialects import KEYWORDS

# training_hub 0.11, in its order; 0.1.0 has the same beginning.
POSITIONAL = """model_path data_path ckpt_output_dir backend num_epochs effective_batch_size learning_rate max_seq_len
max_tokens_per_gpu data_output_dir save_samples warmup_steps accelerate_full_state_at_epoch checkpoint_at_epoch
is_pretraining block_size document_column_name beta1 beta2 eps weight_decay nproc_per_node nnodes node_rank rdzv_id
rdzv_endpoint master_addr master_port wandb_project wandb_entity wandb_run_name tensorboard_log_dir mlflow_tracking_uri
mlflow_experiment_name mlflow_run_name""".split()


class Remember(Backend):
    """Returns the parameters it was given."""

    def execute_training(self, algorithm_params: dict[str, Any]) -> Any:
        return algorithm_params


@pytest.fixture
def remember(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(AlgorithmRegistry, "_backends", {})
    AlgorithmRegistry.register_backend("sft", "remember", Remember)
    return "remember"


def test_positional_parameters_stand_in_the_order_users_know():
    parameters = inspect.signature(sft).parameters
    positional = [name for name, one in parameters.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == POSITIONAL


def test_defaults_are_none_but_for_the_backend():
    for name, parameter in inspect.signature(sft).parameters.items():
        if name in ("model_path", "data_path", "ckpt_output_dir"):
            assert parameter.default is inspect.Parameter.empty
        elif name != "kwargs":
            assert parameter.default == ("instructlab-training" if name == "backend" else None)


def test_every_keyword_is_a_parameter_and_in_the_docstring():
    parameters = set(inspect.signature(sft).parameters)
    assert set(KEYWORDS) | {"backend", "callbacks", "overrides", "kwargs"} == parameters
    assert [name for name in parameters if name not in (sft.__doc__ or "")] == []


def test_an_engine_that_is_installed_runs_the_recipe_and_its_result_comes_back(installed: Path, tmp_path: Path):
    seen: list[StepReport] = []
    rows = [{"text": "a"}]
    result = sft("m", rows, tmp_path / "out", backend="recorder", num_epochs=2, callbacks=seen.append)
    assert isinstance(result, TrainResult)
    assert (result.status, result.engine, result.output_dir) == ("finished", "recorder", tmp_path / "out")
    assert result.plan["recipe"]["training"]["epochs"] == 2
    assert result.plan["rows"] == rows
    assert [report.step for report in seen] == [1]


def test_an_objection_of_the_engine_is_an_error(installed: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="seed: 13 brings bad luck"):
        sft("m", "d", tmp_path / "out", backend="recorder", seed=13)


def test_a_backend_of_ones_own_gets_the_parameters_that_were_given(remember: str):
    watch = print
    given = sft("m", "d", "o", backend=remember, num_epochs=2, callbacks=[watch], my_own_setting=3)
    assert given == {
        "model_path": "m",
        "data_path": "d",
        "ckpt_output_dir": "o",
        "num_epochs": 2,
        "callbacks": [watch],
        "my_own_setting": 3,
    }


def test_a_misspelt_parameter_is_a_value_error_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"sft\(\) has no parameter 'num_epoch'\. Did you mean num_epochs\?"):
        sft("m", "d", "o", num_epoch=3)


def test_an_unknown_backend_is_the_value_error_users_know():
    with pytest.raises(ValueError) as caught:
        sft("m", "d", "o", backend="nothing")
    assert str(caught.value) == "Backend 'nothing' not found for algorithm 'sft'"


def test_several_processes_of_several_nodes_are_in_the_recipe(installed: Path, tmp_path: Path):
    result = sft(
        model_path="m",
        data_path="d",
        ckpt_output_dir=str(tmp_path / "out"),
        backend="recorder",
        nproc_per_node=4,
        nnodes=2,
        node_rank=1,
        rdzv_id=12345,
        rdzv_endpoint="node0:29500",
    )
    processes = result.plan["recipe"]["processes"]
    assert (processes["procs"], processes["nodes"], processes["node_rank"]) == (4, 2, 1)
    assert (processes["rdzv_id"], processes["rdzv_endpoint"]) == (12345, "node0:29500")
