"""Secrets of the surroundings and of the settings are in nothing that a run writes or prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from training_hub.recipe.load import build

CANARY = "c4n4ry5ecret"
IN_SURROUNDINGS = {
    "HF_TOKEN": f"hf_{CANARY}AAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}BBBBBBBBBBBB",
    "WANDB_API_KEY": f"{CANARY}0000000000000000000000000000",
    "AWS_ACCESS_KEY_ID": f"AKIA{CANARY}",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/secret",
    "AWS_SESSION_TOKEN": f"{CANARY}/session",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-mlflow",
    "OPENAI_API_KEY": f"sk-{CANARY}AAAAAAAAAAAA",
    "GITHUB_TOKEN": f"ghp_{CANARY}AAAAAAAAAAAAAAAA",
    "DATABASE_URL": f"postgres://user:{CANARY}@localhost/x",
    "https_proxy": f"http://user:{CANARY}@127.0.0.1:9/",
    "MY_PASSWORD": f"{CANARY}-own",
}
WITH_PASSWORD = f"https://user:{CANARY}@example.com/rows.jsonl"
IN_SETTINGS = (
    *("data.path", "data.validation", "data.chat_template", "data.cache_dir", "model.path", "model.tokenizer"),
    *("output", "monitoring.mlflow_tracking_uri", "monitoring.tensorboard", "processes.rdzv_endpoint"),
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in IN_SURROUNDINGS.items():
        monkeypatch.setenv(name, value)


def places_with_the_canary(*folders: Path) -> list[str]:
    return [
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if CANARY in path.name or (path.is_file() and CANARY.encode() in path.read_bytes())
    ]


def test_a_run_keeps_what_it_finds_in_its_surroundings_to_itself(tmp_path: Path, words: Any, call: Any):
    more = ("--data.cache=true", f"--data.cache_dir={tmp_path / 'cache'}", "--checkpoint.interval=1")
    said = call(*words("--training.preflight=true", "--monitoring.tensorboard=true", *more))
    assert said.code == 0, said.text
    assert CANARY not in said.text
    assert len([path for path in (tmp_path / "run").rglob("*") if path.is_file()]) > 15
    assert places_with_the_canary(tmp_path) == []


@pytest.mark.parametrize("kind", ["settings", "rows", "model", "learning rate", "no file"])
def test_a_run_that_fails_keeps_it_too(kind: str, tmp_path: Path, words: Any, call: Any):
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    run = {
        "settings": words("--training.steps=-1", "--optimizer.lr=x"),
        "rows": words(data=tmp_path / "rows.jsonl"),
        "model": words(model=tmp_path),
        "learning rate": words(
            "--optimizer.name=SGD", "--optimizer.lr=1e30", "--training.max_norm=0", "--training.steps=5"
        ),
        "no file": words(data=tmp_path / "nowhere.jsonl"),
    }[kind]
    said = call(*run)
    assert said.code not in (0, 1)
    assert CANARY not in said.text
    assert places_with_the_canary(tmp_path) == []


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, ...]]:
    """The words that turn each tracker on; what it writes, in its own folders too, lies under tmp_path."""
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # Trackers like to note how a program was called.
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--api-key={CANARY}"])
    address = f"--monitoring.mlflow_tracking_uri={(tmp_path / 'mlflow').as_uri()}"
    return {"wandb": ("--monitoring.wandb=true",), "mlflow": ("--monitoring.mlflow=true", address)}


# Warnings of the trackers about packages of theirs are not ours to mend.
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("ending", ["finished", "failed"])
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_is_told_no_secret(
    tracker: str, ending: str, tmp_path: Path, words: Any, call: Any, trackers: dict[str, tuple[str, ...]]
):
    pytest.importorskip(tracker)
    failing = ("--optimizer.name=SGD", "--optimizer.lr=1e30", "--training.max_norm=0", "--training.steps=5")
    said = call(*words(*trackers[tracker], *(failing if ending == "failed" else ())))
    assert (said.code == 0) == (ending == "finished"), said.text
    assert CANARY not in said.text
    files = [path for path in tmp_path.rglob("*") if path.is_file() and tracker in str(path)]
    told = b"".join(str(path).encode() + path.read_bytes() for path in files)
    assert b"training.global_batch_size" in told or b'"global_batch_size"' in told
    assert b"train/loss" in told or ending == "failed"
    assert places_with_the_canary(tmp_path) == []


@pytest.mark.parametrize("path", IN_SETTINGS)
def test_a_password_in_a_setting_is_refused_and_not_repeated(path: str, tmp_path: Path, words: Any, call: Any):
    said = call(*words("--monitoring.mlflow=true", f"--{path}={WITH_PASSWORD}"))
    assert said.code == 2
    assert path in said.text
    assert CANARY not in said.text
    assert places_with_the_canary(tmp_path) == []


@pytest.mark.parametrize(
    "address", [f"postgresql://host/db?password={CANARY}", f"s3://b/k?X-Amz-Signature={CANARY}&a=1"]
)
def test_a_secret_behind_an_address_is_refused_and_not_repeated(address: str, tmp_path: Path, words: Any, call: Any):
    said = call(*words("--monitoring.mlflow=true", f"--monitoring.mlflow_tracking_uri={address}"))
    assert said.code == 2
    assert CANARY not in said.text
    assert places_with_the_canary(tmp_path) == []


@pytest.mark.parametrize("name", ["api_key", "HF_TOKEN", "wandb_password", "nested.client_secret"])
def test_an_entry_that_its_name_calls_a_secret_is_refused(name: str, tmp_path: Path, words: Any, call: Any):
    *outer, inner = name.split(".")
    value = f"{{{inner}: {CANARY}}}" if outer else CANARY
    said = call(*words(f"--data.template_arguments.{outer[0] if outer else inner}={value}"))
    assert said.code == 2
    assert name in said.text
    assert CANARY not in said.text
    assert places_with_the_canary(tmp_path) == []


def test_a_special_token_for_the_template_is_no_secret():
    assert build({"model.path": "m", "output": "o", "data.template_arguments.bos_token": "<s>"})


@pytest.mark.parametrize("path", ["model.revision", "monitoring.wandb_run_name", "monitoring.wandb_project"])
@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "GITHUB_TOKEN"])
def test_a_token_in_a_setting_is_refused_and_not_repeated(path: str, name: str, tmp_path: Path, words: Any, call: Any):
    said = call(*words("--monitoring.wandb=true", f"--{path}={IN_SURROUNDINGS[name]}"))
    assert said.code == 2
    assert CANARY not in said.text
    assert places_with_the_canary(tmp_path) == []


def test_a_password_in_a_recipe_file_is_refused_and_not_repeated(tmp_path: Path, words: Any, call: Any):
    file = tmp_path.parent / "with_password.yaml"
    file.write_text(json.dumps({"monitoring": {"mlflow": True, "mlflow_tracking_uri": WITH_PASSWORD}}))
    said = call(*words(f"--config={file}"))
    file.unlink()
    assert said.code == 2
    assert CANARY not in said.text
    assert places_with_the_canary(tmp_path) == []
