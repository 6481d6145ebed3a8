"""The command line under torch's own launcher: its processes are the ranks, and no further one is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.invariants.run import recipe, train
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
    assert ended.stdout.count("plan: 8 steps") == 1, "one process speaks"
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
