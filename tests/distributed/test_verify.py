"""A recipe's own layout is compared with one process by the command that a user would type."""

from __future__ import annotations

import json

import pytest

from training_hub.experiments.verify import Comparison, Difference
from training_hub.frontends.cli import main
from training_hub.frontends.commands.verify import lines


def words(model, data, *more: str) -> list[str]:
    settings = ["--model", str(model), "--data", str(data), "--model.dtype", "float32", "--batch-size", "6"]
    return ["verify", *settings, "--no-data.cache", "--compared-steps", "2", *more]


def test_a_divided_layout_is_compared_step_by_step(tiny_model_folder, chat_file, capfd):
    more = ["--processes.procs", "2", "--parallelism.data_parallel_shard_degree=-1", "--json"]
    assert main(words(tiny_model_folder, chat_file, *more)) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["holds"] and found["processes"] == 2 and 0 < found["weights"] < 1e-5
    names = [each["name"] for each in found["steps"]]
    assert names == ["step 1 loss", "step 1 grad_norm", "step 2 loss", "step 2 grad_norm"]
    for each in found["steps"]:
        assert each["together"] == pytest.approx(each["alone"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["tensor_parallel_degree", "context_parallel_degree", "data_parallel_shard_degree"])
def test_so_are_stages_beside_other_ways(other, tiny_model_folder, chat_file, capfd):
    layout = ["--processes.procs", "4", "--parallelism.pipeline_parallel_degree=2", f"--parallelism.{other}=2"]
    assert main(words(tiny_model_folder, chat_file, *layout, "--json")) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["holds"] and found["processes"] == 4 and 0 < found["weights"] < 1e-5


def test_one_process_is_not_compared_with_itself(tiny_model_folder, chat_file, capfd):
    assert main(words(tiny_model_folder, chat_file)) == 2
    assert "verify compares one process with several of this node" in capfd.readouterr().err


def test_what_rounding_does_not_explain_is_said():
    steps = (Difference("step 1 loss", 2.0, 2.001),)
    wrong = Comparison(steps, 1e-7, 1e-4, 4)
    assert not wrong.holds and Comparison(steps, 1e-7, 1e-3, 4).holds
    assert not Comparison((), float("nan"), 1e-4, 4).holds
    told = list(lines(wrong))
    assert "4 processes" in told[0] and "5.0e-04" in told[1] and "do not train in this layout" in told[-1]
