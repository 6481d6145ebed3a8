"""Uploading: only when asked, only the files of final/, and a token that is nowhere afterwards.

The hub is one on the loopback; once the program runs as users run it, with HF_ENDPOINT there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.run import train
from tests.launch.hub_server import Arrived, hub_server
from training_hub.errors import BackendError, RecipeError
from training_hub.folders import manifest
from training_hub.recipe.load import build

# What huggingface_hub says to the library that carries its requests.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
PUSHED = ["--hub.push", "--hub.repo_id", "me/tuned"]


@pytest.fixture
def hub() -> Iterator[tuple[str, Arrived]]:
    with hub_server() as server:
        yield server


class Program:
    """`training-hub sft` on a tiny model, in a process of its own."""

    def __init__(self, model: Path, data: Path, output: Path, endpoint: str):
        self.words = ["sft", "--model", str(model), "--data", str(data), "--output", str(output), "--steps", "2"]
        self.words += ["--training.preflight=false", "--no-data.cache", "--checkpoint.interval", "1"]
        home = output.parent / "home"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "training_hub", *self.words, *more]
        told = {**self.environment, **environment}
        return subprocess.run(program, capture_output=True, text=True, env=told, timeout=180)


@pytest.fixture
def program(tiny_model_folder: Path, chat_file: Path, tmp_path: Path, hub: tuple[str, Arrived]) -> Program:
    return Program(tiny_model_folder, chat_file, tmp_path / "run", hub[0])


def is_private(made: dict[str, Any]) -> bool:
    # Said otherwise by huggingface_hub 1 and 2.
    return made.get("visibility", "private" if made.get("private") else "public") == "private"


def everything_written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    return ((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def test_only_the_files_of_final_arrive_and_the_token_stays_in_the_environment(
    program: Program, hub: tuple[str, Arrived], tmp_path: Path
):
    done = program.run(*PUSHED, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    _, arrived = hub
    final = tmp_path / "run" / "final"
    assert set(arrived.files) - {".gitattributes"} == set(manifest(final)["files"])
    for name in manifest(final)["files"]:
        assert arrived.files[name] == (final / name).read_bytes(), name
    assert {"README.md", "loss.svg", "model.safetensors", "config.json"} <= set(arrived.files)
    assert is_private(arrived.made[0]) and arrived.tokens == {TOKEN}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished" and result["hub"].endswith("/me/tuned/commit/" + "1" * 40)
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path, content in everything_written(tmp_path) if TOKEN.encode() in content]
    assert written == []
    # Nor does it stand in the command that other users of the machine see.
    assert TOKEN not in " ".join(program.words + PUSHED)


@pytest.fixture
def connected(hub: tuple[str, Arrived], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arrived:
    """This process with the library's settings for a hub on the loopback, which it otherwise reads as it starts."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub[0])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub[1]


SMALL = {"training": {"steps": 2, "preflight": False}}
TUNED = {"push": True, "repo_id": "me/tuned"}


def test_a_finished_run_is_uploaded_later_and_not_twice(
    connected: Arrived, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    places = (tiny_model_folder, chat_file, tmp_path / "run")
    assert train(*places, **SMALL).hub == ""
    assert connected.requests == [], "nothing is asked of the network unless a push is asked for"
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    later = train(*places, **SMALL, hub={**TUNED, "private": False})
    assert later.status == "already finished" and later.hub.endswith("1" * 40)
    assert connected.commits == 1 and connected.files["model.safetensors"] == weights
    assert not is_private(connected.made[0])
    assert train(*places, **SMALL, hub=TUNED).hub == later.hub
    assert connected.commits == 1


def test_what_is_uploaded_says_nowhere_on_which_disk_it_was_made(
    connected: Arrived, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    pytest.importorskip("peft")
    cached = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    for model, name in ((tiny_model_folder, tiny_model_folder.name), (cached, "someone/small")):
        if model is cached:
            shutil.copytree(tiny_model_folder, cached)
        kept = {**SMALL, "algorithm": "lora_sft", "lora": {"r": 2}, "hub": TUNED}
        result = train(model, chat_file, tmp_path / name, **kept)
        said = json.loads(connected.files["adapter_config.json"])
        assert said["base_model_name_or_path"] == name
        here = json.loads((tmp_path / name / "final" / "adapter_config.json").read_text())
        assert here == {**said, "base_model_name_or_path": str(model.resolve())}, "it is loaded from there"
        for folder in (tmp_path, tiny_model_folder.parent, chat_file.parent):
            told = [file for file, content in connected.files.items() if str(folder).encode() in content]
            assert told == []
        assert ("base_model: someone/small" in connected.files["README.md"].decode()) is (model is cached)
        assert result.hub


def test_a_refused_upload_is_an_error_that_leaves_the_model_whole(
    connected: Arrived, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    places = (tiny_model_folder, chat_file, tmp_path / "run")
    connected.refuses = ("/commit/",)
    with pytest.raises(BackendError, match=r"me/tuned: .*run the same command again to upload") as caught:
        train(*places, **SMALL, hub=TUNED)
    assert TOKEN not in str(caught.value)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    connected.refuses = ()
    assert train(*places, **SMALL, hub=TUNED).hub and connected.commits == 1


def test_what_would_fail_at_the_end_is_said_before_the_model_is_loaded(
    connected: Arrived, tiny_model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    places = (tiny_model_folder, chat_file, tmp_path / "run")
    connected.refuses = ("whoami",)
    with pytest.raises(RecipeError, match="does not take the token") as caught:
        train(*places, **SMALL, hub=TUNED)
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RecipeError, match="Set HF_TOKEN in the environment"):
        train(*places, **SMALL, hub=TUNED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE is set"):
        train(*places, **SMALL, hub=TUNED)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"hub.push": True}, "hub.repo_id: not given"),
        ({"hub.push": True, "hub.repo_id": "tuned"}, "OWNER/NAME"),
        ({"hub.push": True, "hub.repo_id": "me/a..b"}, "OWNER/NAME"),
        ({"hub.push": True, "hub.repo_id": "../etc"}, "OWNER/NAME"),
        ({"hub.repo_id": "me/tuned"}, "hub.push: true"),
        ({"hub.private": False}, "hub.push: true"),
        ({"hub.push": True, "hub.repo_id": "me/tuned", "checkpoint.final": False}, "nothing to upload"),
        ({"hub.push": True, "hub.repo_id": f"me/{TOKEN}"}, "holds an access token"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(RecipeError) as caught:
        build({"model.path": "m", "data.path": "d", "output": "o", **settings})
    assert any(said in problem for problem in caught.value.problems), caught.value.problems
    assert TOKEN not in str(caught.value)
