"""The command line under torch's own launcher: its processes are the ranks, and no further one is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.run import recipe, train
from tests.ports import free_port
from training_hub.recipe.load import dump

pytestmark = pytest.mark.slow
SETTINGS = {"training": {"global_batch_size": 8, "epochs": 1, "preflight": False}}


def torchrun(file: Path, count: int, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    program = ["-m", "training_hub", "sft", "--config", str(file), *words]
    return subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=300)


def test_its_processes_are_the_ranks(tiny_model_folder, chat_file, tmp_path):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", monitoring={"console": "plain"}, **SETTINGS)
    (tmp_path / "run.yaml").write_text(dump(asked))
    ended = torchrun(tmp_path / "run.yaml", 2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("plan: 8 steps") == ended.stdout.count("finished: model in") == 1, "one process speaks"
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["processes"] == 2
    assert not (tmp_path / "run" / "logs").exists(), "and none was started"
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", **SETTINGS)
    last = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["loss"]
    assert last == pytest.approx(alone.metrics["loss"], rel=1e-6)


def test_more_processes_than_it_started_are_refused(tiny_model_folder, chat_file, tmp_path):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", processes={"procs": 4}, **SETTINGS)
    (tmp_path / "run.yaml").write_text(dump(asked))
    ended = torchrun(tmp_path / "run.yaml", 1)
    assert ended.returncode != 0
    assert "4 processes on 1 nodes are asked for" in ended.stderr and "WORLD_SIZE is 1" in ended.stderr
    assert not (tmp_path / "run").exists()


# The calls of the pages of training_hub, without a word of processes: torchrun says it.
OF_SFT = {"num_epochs": 1, "effective_batch_size": 16, "learning_rate": 1e-5, "max_seq_len": 256}
OF_OSFT = {**OF_SFT, "unfreeze_rank_ratio": 0.3, "max_tokens_per_gpu": 2048}


@pytest.mark.parametrize(("function", "settings"), [("sft", OF_SFT), ("osft", OF_OSFT)])
def test_a_program_that_it_starts_on_two_nodes_is_one_run(
    function: str, settings: dict[str, Any], tiny_model_folder, chat_file, tmp_path
):
    """Two of its agents, each with a process of the program, meet as they do on two machines."""
    paths = {
        "model_path": str(tiny_model_folder),
        "data_path": str(chat_file),
        "ckpt_output_dir": str(tmp_path / "run"),
    }
    program = tmp_path / "program.py"
    call = f"result = {function}(**{ {**paths, **settings}!r})\nprint(result.status, result.plan['processes'])\n"
    program.write_text(f"from training_hub import {function}\n\n{call}")
    place = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *place]
    nodes = [
        subprocess.Popen([*launcher, f"--node-rank={rank}", str(program)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for node in nodes:
        said, _ = node.communicate(timeout=300)
        assert node.returncode == 0 and said.splitlines()[-1] == "finished 2"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
