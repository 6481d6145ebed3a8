"""Files that run code when they are unpickled, at every place that is read: none of them runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training_hub.folders import MANIFEST, sha256

BESIDE_WEIGHTS = (
    *("pytorch_model.bin", "model.bin", "model.pt", "consolidated.00.pth", "training_args.bin", "optimizer.pt"),
    *("scheduler.pt", "rng_state.pth", "adapter_model.bin", "weights.npy", "embeddings.npz", "model.pkl", "model.ckpt"),
    *("generation_config.bin", "special.joblib"),
)
BESIDE_TOKENIZER = ("vocab.pkl", "added_tokens.pt", "tokenizer.bin", "merges.npy", "preprocessor.joblib")
BESIDE_CHECKPOINT = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model.bin", "state.npy")
IN_PLACE_OF_DATA = (
    *("rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet", "rows.pt", "rows.pth", "rows.bin"),
    *("rows.npy", "rows.pkl", "rows.arrow", "rows"),
)
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "recipe.yaml", MANIFEST)
REFUSALS = (2, 3, 4, 5, 6)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def payload(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def plant(place: Path, payload: bytes) -> None:
    """The payload at `place`, as the format that its name says where that format can hold one."""
    if place.suffix == ".npy":
        header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        with place.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            stream.write(payload)
    else:
        place.write_bytes(payload)


def test_the_payload_works(payload: bytes, canary: Path):
    pickle.loads(payload)  # noqa: S301
    assert canary.is_dir()


def test_an_array_with_the_payload_works(payload: bytes, canary: Path, tmp_path: Path):
    plant(tmp_path / "x.npy", payload)
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # what comes out is no array
        np.load(tmp_path / "x.npy", allow_pickle=True)
    assert canary.is_dir()


def test_payloads_beside_what_is_read_are_left_alone(
    tiny_model_folder: Path, tmp_path: Path, payload: bytes, canary: Path, words: Callable[..., Any], call: Any
):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_model_folder, model)
    data.mkdir()
    (data / "rows.jsonl").write_text('{"prompt": "What?", "completion": "This."}\n' * 4)
    for name in (*BESIDE_WEIGHTS, *BESIDE_TOKENIZER):
        plant(model / name, payload)
    for name in ("rows.pt", "rows.npy", "rows.pkl", "rows.bin", "dataset.arrow"):
        plant(data / name, payload)
    run = words("--checkpoint.interval=1", "--no-checkpoint.final", model=model, data=data)
    assert call(*run).code == 0
    for name in BESIDE_CHECKPOINT:
        plant(tmp_path / "run" / "checkpoints" / "step-1" / name, payload)
    (tmp_path / "run" / "result.json").unlink()
    said = call(*run)
    assert said.code == 0, said.text
    assert "going on after step 1" in said.text
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "adapter_model.bin"])
def test_weights_that_are_only_there_as_pickle_are_refused(
    name: str, tiny_model_folder: Path, tmp_path: Path, payload: bytes, canary: Path, words: Any, call: Any
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    (model / "model.safetensors").unlink()
    plant(model / name, payload)
    said = call(*words(model=model))
    assert said.code == 2
    assert "pickle files" in said.text
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_payload_under_the_name_of_a_model_file_is_refused(
    name: str, tiny_model_folder: Path, tmp_path: Path, payload: bytes, canary: Path, words: Any, call: Any
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    plant(model / name, payload)
    assert call(*words(model=model)).code in REFUSALS
    assert not canary.exists()


@pytest.mark.parametrize("name", IN_PLACE_OF_DATA)
def test_a_payload_as_data_is_refused(name: str, tmp_path: Path, payload: bytes, canary: Path, words: Any, call: Any):
    plant(tmp_path / name, payload)
    assert call(*words(data=tmp_path / name)).code in REFUSALS
    assert not canary.exists()


@pytest.mark.parametrize("flag", ["--data.chat_template", "--config", "--model.tokenizer", "--data.validation"])
def test_a_payload_where_another_file_is_named_is_refused(
    flag: str, tmp_path: Path, payload: bytes, canary: Path, words: Any, call: Any
):
    plant(tmp_path / "file.bin", payload)
    assert call(*words(f"{flag}={tmp_path / 'file.bin'}")).code in REFUSALS
    assert not canary.exists()


@pytest.mark.parametrize(
    "name, is_sealed",
    [*((name, False) for name in CHECKPOINT_FILES), *((name, True) for name in CHECKPOINT_FILES[:3])],
)
def test_a_payload_in_a_checkpoint_is_refused(
    name: str, is_sealed: bool, tmp_path: Path, payload: bytes, canary: Path, words: Any, call: Any
):
    run = words("--checkpoint.interval=1", "--no-checkpoint.final", "--training.steps=2")
    assert call(*words("--checkpoint.interval=1", "--no-checkpoint.final")).code == 0
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    plant(folder / name, payload)
    if is_sealed:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "run" / "result.json").unlink()
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace("steps: 1", "steps: 2"))
    said = call(*run)
    assert said.code in REFUSALS, said.text
    assert not canary.exists()


@pytest.mark.parametrize("name", ["ids.bin", "weights.bin", "offsets.bin", "store.json", MANIFEST])
def test_a_payload_in_the_cache_is_made_again(
    name: str, tmp_path: Path, payload: bytes, canary: Path, words: Any, call: Any
):
    cached = words("--data.cache=true", f"--data.cache_dir={tmp_path / 'cache'}")
    assert call(*cached).code == 0
    for entry in (tmp_path / "cache").rglob(name):
        plant(entry, payload)
    said = call(*cached, f"--output={tmp_path / 'again'}")
    assert said.code == 0, said.text
    assert "made again" in said.text
    assert not canary.exists()
