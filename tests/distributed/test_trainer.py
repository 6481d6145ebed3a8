"""SFTTrainer in two processes under torchrun: live rows, evaluation sets and callbacks, with the numbers of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys
from training_hub import AutoEasyDeLModelForCausalLM, SFTConfig, SFTTrainer

class Enough:
    stop_reason = ""
    def __call__(self, report):
        self.stop_reason = "enough" if report.step == 3 else ""

folder, model = sys.argv[1:]
rows = [{"prompt": f"What comes after {n}? ", "completion": f"{n + 1}." + " So it is." * (n % 3)} for n in range(32)]
trainer = SFTTrainer(
    arguments=SFTConfig(
        save_directory=folder, model_name="run", total_batch_size=8, evaluation_steps=1, learning_rate=1e-3,
        packing=True, overrides={"training.preflight": False, "model.dtype": "float32", "data.cache": False},
    ),
    model=AutoEasyDeLModelForCausalLM.from_pretrained(model),
    train_dataset=rows, eval_dataset={"first": rows[:5], "last": rows[-3:]}, callbacks=[Enough()],
)
result = trainer.train().result
assert result.status == "stopped"
assert result.reason == ("enough" if os.environ["RANK"] == "0" else "a callback of the first process ended it")
trainer.save_model(folder + "/saved")
"""


def history(folder: Path, model: Path, count: int) -> list[dict[str, Any]]:
    program = folder / "program.py"
    folder.mkdir()
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    ended = subprocess.run(
        [*launcher, str(program), str(folder), str(model)], capture_output=True, text=True, timeout=300, cwd=folder
    )
    assert ended.returncode == 0, ended.stderr
    assert (folder / "saved" / "model.safetensors").is_file()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_measure_and_end_as_one(tiny_model_folder: Path, tmp_path: Path):
    alone, together = (history(tmp_path / str(count), tiny_model_folder, count) for count in (1, 2))
    assert len(alone) == len(together) == 3
    degrees = yaml.safe_load((tmp_path / "2" / "run" / "recipe.yaml").read_text())["parallelism"]
    assert degrees["data_parallel_shard_degree"] == -1, "as EasyDeL's mesh has it, the model is divided over both"
    for one, two in zip(alone, together, strict=True):
        for name in ("loss", "validation_loss", "validation_loss/first", "validation_loss/last"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)
