"""The flags and the function describe one job; nothing is submitted, and nothing of Slurm is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_hub import RecipeError, submit_to_slurm
from training_hub.frontends.cli import main


@pytest.fixture
def paths(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, str]:
    return {"model_path": str(tiny_model_folder), "data_path": str(chat_file), "ckpt_output_dir": str(tmp_path / "out")}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_flags_and_keywords_give_one_script(paths, capsys):
    shared: dict[str, Any] = {"partition": "gpu", "time": "8:00:00", "memory": "64G", "signal": "TERM@300"}
    by_function = submit_to_slurm(
        **paths,
        nnodes=2,
        nproc_per_node=4,
        gpus_per_node=4,
        requeue=False,
        sbatch=["--exclusive"],
        dry_run=True,
        **shared,
    )
    model, data, output = paths.values()
    flags = [f"--{name}={value}" for name, value in shared.items()]
    run = [f"--model={model}", f"--data={data}", f"--output={output}", "--nodes=2", "--procs-per-node=4"]
    more = ["--gpus-per-node=4", "--no-requeue", "--sbatch=--exclusive", "--dry-run"]
    assert printed(capsys, "slurm", "submit", *run, *flags, *more) == by_function.text
    assert by_function.job is None and not Path(output).exists()


def test_processes_are_what_the_recipe_says_else_one_for_each_gpu(paths, capsys):
    model, data, output = paths.values()
    run = ["slurm", "submit", f"--model={model}", f"--data={data}", f"--output={output}", "--dry-run"]
    assert "srun --nodes=3 " in printed(capsys, *run, "--processes.nodes=3")
    refused = [*run, "--gpus-per-node=4", "--processes.procs=8"]
    assert main(refused) == 2
    assert "Write --procs-per-node 4" in capsys.readouterr().err


def test_a_layout_is_judged_by_the_processes_that_the_job_will_have(paths, capsys):
    model, data, output = paths.values()
    run = ["slurm", "submit", f"--model={model}", f"--data={data}", f"--output={output}", "--dry-run"]
    job = [*run, "--nodes=2", "--procs-per-node=4"]
    assert "srun --nodes=2 " in printed(capsys, *job, "--parallelism.data_parallel_shard_degree=8")
    assert main([*job, "--parallelism.data_parallel_shard_degree=3"]) == 2
    assert "data_parallel_shard_degree 3 must divide the number of processes, which is 8" in capsys.readouterr().err


def test_the_algorithm_of_the_recipe_is_the_one_that_is_sent(paths):
    sent = submit_to_slurm("osft", **paths, **OSFT, dry_run=True)
    assert "-m training_hub osft --config" in sent.text


OSFT = {
    "unfreeze_rank_ratio": 0.3,
    "effective_batch_size": 16,
    "max_tokens_per_gpu": 2048,
    "max_seq_len": 2048,
    "learning_rate": 2e-5,
}


@pytest.mark.parametrize("live", [{"data_path": [{"messages": []}]}, {"callbacks": [print]}])
def test_live_objects_cannot_be_sent(paths, live: dict[str, Any]):
    with pytest.raises(RecipeError, match="a live object stays in this process"):
        submit_to_slurm(**{**paths, **live}, dry_run=True)


def test_a_job_needs_a_whole_recipe_and_its_other_commands_need_none(capsys):
    assert main(["slurm", "submit", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "--model" in said and "--data" in said and "--output" in said
    assert main(["slurm", "status", "nowhere"]) == 2
    assert "neither the number of a job nor the folder of a run" in capsys.readouterr().err
    assert main(["slurm", "status"]) == 2
    assert main(["slurm"]) == 2
    assert main(["slurm", "logs", "x", "--seed=1"]) == 2


def test_the_yaml_for_others_is_printed(capsys):
    run = ["--model=org/model", "--data=/mnt/runs/chat.jsonl", "--output=/mnt/runs/run", "--volume=claim:/mnt/runs"]
    assert "kind: TrainJob" in printed(capsys, "kubeflow", *run, "--image=reg/hub:1", "--gpus-per-node=8")
    assert "num_nodes: 2" in printed(capsys, "skypilot", *run, "--nodes=2")
    assert main(["kubeflow", *run]) == 2
    assert "--image" in capsys.readouterr().err
