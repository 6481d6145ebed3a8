"""`training-hub plan --world-size N`, and the page that is made of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from training_hub.frontends.cli import main
from training_hub.recipe.names import all_settings
from training_hub.scaling.choose import ROOM

ROOT = Path(__file__).parents[2]


def plan(*words: str) -> list[str]:
    return [
        "plan",
        "--world-size",
        "64",
        "--model",
        "llama3_70b",
        "--batch-size",
        "1024",
        "--max-seq-len",
        "8192",
        *words,
    ]


def as_json(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_what_to_take_with_the_settings_and_why(capsys: pytest.CaptureFixture[str]):
    assert main(plan()) == 0
    said = capsys.readouterr().out
    assert "70.6 B parameters" in said
    assert "64 x h100 of 79.6 GiB, 8 in a host" in said
    assert "parallelism.data_parallel_shard_degree=" in said
    named = [word.partition("=")[0] for word in said.split() if word.startswith("parallelism.") and "=" in word]
    assert named
    missing = [name for name in named if name not in all_settings()]
    assert ("this version cannot train so yet" in said) == bool(missing)
    assert "DDP does not fit: 1,197 GiB at least, 64 are planned" in said
    assert sum(line.startswith("* ") for line in said.splitlines()) == 1


def test_it_needs_no_data_no_output_and_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import subprocess
    import sys

    call = f"import sys; from training_hub.frontends.cli import main; main({plan()!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_more_memory_takes_a_simpler_layout(capsys: pytest.CaptureFixture[str]):
    small, large = (as_json(capsys, plan("--gpu-memory", gib)) for gib in ("80", "2000"))
    assert small["chosen"]["memory_gib"]["total"] <= ROOM * 80
    assert large["chosen"]["family"] in ("DDP", "FSDP", "HSDP")
    assert large["chosen"]["layout"]["checkpointing"] == "none"


def test_the_recipe_decides_the_step(capsys: pytest.CaptureFixture[str]):
    found = as_json(capsys, plan("training.activation_checkpointing=full"))
    assert {one["layout"]["checkpointing"] for one in found["layouts"]} == {"full"}
    assert found["step"] == {"samples": 1024, "tokens_per_sample": 8192}


def test_a_folder_is_read_by_its_config_alone(capsys: pytest.CaptureFixture[str], tiny_model_folder: Path):
    found = as_json(capsys, ["plan", "--world-size", "2", "--model", str(tiny_model_folder)])
    assert found["model"]["layers"] == 2
    assert found["chosen"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h1000"], "known: a100, h100, h200, b200. Did you mean h100?"),
        (["--gpus-per-node", "x"], "--gpus-per-node: found 'x'; allowed: a whole number"),
        (["--gpu-memory", "-3"], "--gpu-memory"),
        (["--rate", "measure"], "leave it out with --world-size"),
        (["--algorithm=osft", "osft.energy=0.5"], "layouts are compared for sft"),
        (["training.global_batch_size=1", "--world-size=7"], "divides evenly"),
    ],
)
def test_what_cannot_be_computed_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(plan(*words)) == 2
    assert said in capsys.readouterr().err


def test_options_of_devices_need_a_number_of_them(capsys: pytest.CaptureFixture[str], chat_file: Path):
    assert main(["plan", "--model", "m", "--data", str(chat_file), "--gpu", "h100"]) == 2
    assert "--gpu: would change nothing without --world-size" in capsys.readouterr().err


def test_the_page_is_up_to_date(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("make_scaling", ROOT / "docs" / "make_scaling.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.write(tmp_path / "scaling.md")
    kept = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert kept == (tmp_path / "scaling.md").read_text(encoding="utf-8"), "run: python docs/make_scaling.py"
