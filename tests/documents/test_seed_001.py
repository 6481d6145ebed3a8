"""torchforge's page "SFT (Supervised Fine-Tuning) Training": each of its snippets about SFT, here, on a CPU.

Keys, values and command lines are the page's; paths and models are small ones, `forge.apps` is `training_hub.apps`.
What the page gets wrong is answered by an error that says what to write; the tests of these are named so. Actors have
tests of their own, and its notebook (tests/documents/test_notebook.py).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents.snippets import ROOT
from training_hub.apps.sft import check, load
from training_hub.errors import RecipeError
from training_hub.frontends.cli import main
from training_hub.frontends.forge.schema import KEYS
from training_hub.recipe.yaml_text import read_yaml, write_yaml

# The page's "YAML Structure", with paths to be filled in.
STRUCTURE = """
comm:
  trace_buf_size: 0

model:
  name: llama3
  flavor: 8B
  hf_assets_path: /path/to/model

processes:
  procs: 8           # Number of processes (usually = number of GPUs)
  with_gpus: true

optimizer:
  name: AdamW
  lr: 1e-5
  eps: 1e-8

lr_scheduler:
  warmup_steps: 200

training:
  local_batch_size: 1
  seq_len: 2048
  max_norm: 1.0
  steps: 1000
  compile: false
  dataset: c4

parallelism:
  data_parallel_replicate_degree: 1
  data_parallel_shard_degree: -1    # -1 = use all GPUs for FSDP
  tensor_parallel_degree: 1
  pipeline_parallel_degree: 1
  context_parallel_degree: 1
  expert_parallel_degree: 1
  disable_loss_parallel: false

checkpoint:
  enable: true
  folder: /path/to/checkpoints
  initial_load_path: /path/to/model
  initial_load_in_hf: true
  last_save_in_hf: true
  interval: 500
  async_mode: disabled

activation_checkpoint:
  mode: selective
  selective_ac_option: op
"""

QUICK = """
training:
  steps: 10                  # Just 10 steps
  dataset: c4_test           # Tiny test dataset

processes:
  procs: 1                   # Single GPU
"""

PRODUCTION = """
training:
  steps: 10000               # Full training run
  dataset: c4                # Full C4 dataset

processes:
  procs: 8                   # All 8 GPUs
"""

SCARCE = """
training:
  local_batch_size: 1        # Smallest batch size
  seq_len: 1024              # Shorter sequences

activation_checkpoint:
  mode: selective            # Enable activation checkpointing
"""

LOG_LINE = re.compile(r"\[Trainer-0/1\] \d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO (\d+) / 10\|Loss: \d+\.\d{3}\n")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def structure(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The page's configuration with a tiny model, which is no 8B."""
    text = STRUCTURE.replace("/path/to/model", str(tiny_model_folder)).replace("flavor: 8B", "flavor: debugmodel")
    return read_yaml(text.replace("/path/to/checkpoints", str(tmp_path / "checkpoints")), "the page")


def with_snippet(config: dict[str, Any], snippet: str) -> dict[str, Any]:
    """The configuration with the keys of a snippet changed, as the page asks for."""
    changed = copy.deepcopy(config)
    for section, keys in read_yaml(snippet, "a snippet").items():
        changed[section] = {**changed.get(section, {}), **keys}
    return changed


def run(config: dict[str, Any], *words: str) -> int:
    Path("config.yaml").write_text(write_yaml(config))
    return main(["forge", "--config", "config.yaml", *words])


def error_of(config: dict[str, Any], snippet: str = "{}") -> str:
    with pytest.raises(RecipeError) as caught:
        check(with_snippet(config, snippet))
    return str(caught.value)


def test_the_command_line_runs_from_any_folder_with_the_presets_own_path(tiny_model_folder: Path, tmp_path: Path):
    """`python -m training_hub.apps.sft.main --config training_hub/apps/sft/llama3_8b.yaml` with the page's quick test
    behind it, where the page says that only the root of the repository will do."""
    small = [f"--model.hf_assets_path={tiny_model_folder}", "--model.flavor=debugmodel", "--training.seq_len=64"]
    small += [f"--checkpoint.initial_load_path={tiny_model_folder}", "--processes.procs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "training_hub.apps.sft.main", "--config", "training_hub/apps/sft/llama3_8b.yaml",
         "--training.steps=10", "--training.dataset=c4_test", *small],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(step) for step in LOG_LINE.findall(done.stdout)] == list(range(1, 11)), "the page's example output"
    assert (tmp_path / "checkpoint" / "final" / "model.safetensors").is_file()


def test_the_whole_structure_is_a_run_for_quick_testing(structure: dict[str, Any]):
    assert run(with_snippet(structure, QUICK), "training.seq_len=64", "--checkpoint.interval=5") == 0
    recipe = yaml.safe_load(Path("checkpoints/recipe.yaml").read_text())
    assert (recipe["training"]["steps"], recipe["optimizer"]["lr"], recipe["optimizer"]["eps"]) == (10, 1e-5, 1e-8)
    assert recipe["training"]["activation_checkpointing"] == "selective"
    rows = [json.loads(line) for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("step")]
    # What the page says that logs show: loss, learning rate, memory; checkpoints are folders.
    assert all({"loss", "learning_rate", "memory_gib"} <= row.keys() for row in steps)
    saved = sorted(path.name for path in Path("checkpoints/checkpoints").iterdir() if path.name.startswith("step-"))
    assert saved == ["step-10", "step-5"]
    for step in saved:  # the page has step_500/model.pt and optimizer.pt, which torchforge does not write either
        assert {"model.safetensors", "optimizer.safetensors"} <= {
            p.name for p in Path("checkpoints/checkpoints", step).iterdir()
        }


@pytest.mark.slow
def test_several_processes_share_out_a_step(structure: dict[str, Any]):
    """The page's "Single Node (8 GPUs)" with two processes, whose losses are those of one with all samples."""
    losses = []
    for procs, rows in ((1, 4), (2, 2)):
        changed = f"{{processes: {{procs: {procs}}}, training: {{steps: 3, seq_len: 64, local_batch_size: {rows}}}}}"
        folder = f"of-{procs}"
        words = (f"checkpoint.folder={folder}", "training.dataset=c4_test", "training.mixed_precision_param=float32")
        words += ("lr_scheduler.warmup_steps=0", "optimizer.lr=1e-3")
        assert run(with_snippet(structure, changed), *words) == 0
        rows_of = (json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows_of if row.get("step")])
    # Float32, and the same sums in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_production_and_memory_constrained_settings_arrive(structure: dict[str, Any]):
    recipe = check(with_snippet(structure, PRODUCTION))
    assert (recipe.training.steps, recipe.data.path, recipe.processes.procs) == (10000, "allenai/c4:en", 8)
    assert recipe.training.global_batch_size == 8, "one row of each process"
    recipe = check(with_snippet(structure, SCARCE))
    assert (recipe.training.max_seq_len, recipe.training.max_tokens_per_gpu) == (1024, 1024)
    assert recipe.training.activation_checkpointing == "selective"


@pytest.mark.parametrize("name", ["c4", "c4_test", "c4_validation"])
def test_the_data_sets_of_the_table(structure: dict[str, Any], name: str):
    assert check(with_snippet(structure, f"training: {{dataset: {name}}}")).data.pretraining


def test_a_data_set_of_ones_own_is_named_not_programmed(structure: dict[str, Any], chat_file: Path):
    """The page: "Modify utils.py or trainer_actor.py"."""
    own = with_snippet(
        structure, f"{{training: {{dataset: {chat_file}, steps: 2, seq_len: 128}}, processes: {{procs: 1}}}}"
    )
    assert run(own) == 0
    plan = json.loads(Path("checkpoints/plan.json").read_text())
    assert plan["chat_template"]
    assert 0 < plan["trained_tokens"] < plan["tokens"], "the assistant's words"


def test_32_processes_are_asked_for_as_four_hosts_of_eight(structure: dict[str, Any]):
    said = error_of(structure, "processes: {procs: 32, with_gpus: true}")
    assert "write processes: {hosts: 4, procs: 8}" in said
    recipe = check(with_snippet(structure, "processes: {hosts: 4, procs: 8, rdzv_endpoint: node0:29500}"))
    assert (recipe.processes.nodes, recipe.processes.procs, recipe.training.global_batch_size) == (4, 8, 32)


def test_a_cluster_is_given_a_script(
    structure: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The page's `sbatch --nodes=4 --gpus-per-node=8 python -m ...` is none: sbatch wants a script."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said = error_of(structure, "provisioner: {launcher: slurm}")
    assert "training-hub slurm submit --config RECIPE.yaml --nodes 4 --gpus-per-node 8" in said
    config = with_snippet(structure, "processes: {procs: 8, with_gpus: true}")
    assert run(config, "training.dataset=c4_test", "--recipe", "recipe.yaml") == 0
    assert main(["slurm", "submit", "--config", "recipe.yaml", "--nodes=4", "--gpus-per-node=8", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=4" in printed


@pytest.mark.parametrize(
    ("snippet", "degrees"),
    [
        (
            "parallelism: {data_parallel_shard_degree: 8, tensor_parallel_degree: 1, pipeline_parallel_degree: 1}",
            (8, 1),
        ),
        (
            "parallelism: {data_parallel_shard_degree: 4, tensor_parallel_degree: 2, pipeline_parallel_degree: 1}",
            (4, 2),
        ),
    ],
    ids=["7B on 8 GPUs", "70B on 8 GPUs"],
)
def test_the_example_layouts_are_settings_of_the_recipe_or_refused_in_words(
    structure: dict[str, Any], snippet: str, degrees: tuple[int, int]
):
    names = [f"parallelism.{name}_degree" for name in ("data_parallel_shard", "tensor_parallel")]
    missing = [name for name, degree in zip(names, degrees, strict=True) if not KEYS[name].setting and degree > 1]
    if missing:
        said = error_of(structure, snippet)
        assert all(f"{name}: found" in said for name in missing)
    else:
        found = check(with_snippet(structure, snippet)).model_dump()["parallelism"]
        assert (found["data_parallel_shard_degree"], found.get("tensor_parallel_degree", 1)) == degrees


def test_the_remedies_of_troubleshooting_are_settings(structure: dict[str, Any]):
    for snippet, path, value in (
        ("training: {local_batch_size: 1}", ("training", "max_tokens_per_gpu"), 2048),
        ("training: {seq_len: 512}", ("training", "max_seq_len"), 512),
        ("activation_checkpoint: {mode: selective}", ("training", "activation_checkpointing"), "selective"),
        ("parallelism: {data_parallel_shard_degree: -1}", ("processes", "procs"), 8),
        ("optimizer: {lr: 1e-6}", ("optimizer", "lr"), 1e-6),
        ("lr_scheduler: {warmup_steps: 500}", ("lr_scheduler", "warmup_steps"), 500),
        ("training: {max_norm: 1.0}", ("training", "max_norm"), 1.0),
    ):
        recipe = check(with_snippet(structure, snippet)).model_dump()
        assert recipe[path[0]][path[1]] == value


def test_a_run_is_resumed_from_its_checkpoint(structure: dict[str, Any]):
    """The page's "Resume from Checkpoint": initial_load_path: /path/to/checkpoint/step_500/."""
    small = with_snippet(structure, QUICK)
    words = ("training.steps=4", "training.seq_len=64", "checkpoint.interval=2")
    assert run(small, *words) == 0
    losses = [json.loads(line).get("loss") for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()]
    for gone in ("final", "checkpoints/step-4"):  # as if it had been stopped behind step 2
        shutil.rmtree(Path("checkpoints") / gone)
    Path("checkpoints/result.json").unlink()
    again = with_snippet(
        small, f"checkpoint: {{enable: true, initial_load_path: {Path('checkpoints/step_2').resolve()}/}}"
    )
    assert run(again, *words) == 0
    resumed = [json.loads(line).get("loss") for line in Path("checkpoints/metrics.jsonl").read_text().splitlines()]
    assert resumed == losses, "bit for bit"


def test_the_presets_of_the_files_overview_are_there():
    for name in ("llama3_8b", "qwen3_8b"):
        assert load(f"training_hub/apps/sft/{name}.yaml")["model"]["flavor"] == "8B"


def test_sft_takes_the_file_as_it_is(structure: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    """`training-hub sft --config FILE` knows torchforge's file by its keys."""
    Path("config.yaml").write_text(write_yaml(structure))
    assert main(["sft", "--config", "config.yaml", "training.stps=2"]) == 2
    assert "training.stps: not a key. Did you mean training.steps?" in capsys.readouterr().err
