"""What the user names is read, and nothing else; what is written lies in the output and cache folders."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.security.conftest import outside
from training_hub.backends.torch_engine.fused.build import kernels

ROW = '{"prompt": "What?", "completion": "This."}\n'


def test_a_run_writes_into_its_output_and_cache_only(
    tmp_path: Path, tiny_model_folder: Path, chat_file: Path, watched: Any, words: Any, call: Any
):
    before = {path: path.stat().st_mtime_ns for path in (*tiny_model_folder.iterdir(), chat_file)}
    more = ["--data.cache=true", f"--data.cache_dir={tmp_path / 'cache'}", "--checkpoint.interval=1"]
    kernels()  # of this machine, not of this run: they are built once and kept in the user's cache
    with watched() as record:
        said = call(*words("--training.preflight=true", *more))
    assert said.code == 0, said.text
    assert len(record.written) > 20
    assert outside(record.written, tmp_path / "run", tmp_path / "cache") == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("name", ["../rows.jsonl", "../../{parent}/rows.jsonl", "./../*.jsonl", "../**/rows.jsonl"])
def test_the_way_a_user_writes_a_path_is_the_users_own(
    name: str, tmp_path: Path, words: Any, call: Any, monkeypatch: Any
):
    (tmp_path / "rows.jsonl").write_text(ROW * 4)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert call(*words(data=name.format(parent=tmp_path.name))).code == 0


@pytest.mark.parametrize("kind", ["loop", "to nothing", "to a device", "fifo", "socket folder", "device"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path, words: Any, call: Any):
    place = tmp_path / "rows.jsonl"
    if kind == "loop":
        place.symlink_to(place)
    elif kind == "to nothing":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "to a device":
        place.symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket folder":
        place.mkdir()
    else:
        place = Path("/dev/zero")
    assert call(*words(data=place)).code in (2, 3)


@pytest.mark.parametrize(
    "names", [("../escaped.jsonl",), ("/escaped.jsonl",), ("rows.jsonl",), ("a/../../escaped.jsonl",)]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_not_unpacked(
    kind: str, names: tuple[str, ...], tmp_path: Path, watched: Any, words: Any, call: Any
):
    archive, row = tmp_path / f"rows.{kind}", tmp_path / "row"
    row.write_text(ROW)
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as made:
            for name in names:
                made.write(row, name)
    else:
        with tarfile.open(archive, "w") as made:
            for name in names:
                made.add(row, name)
    with watched() as record:
        assert call(*words(data=archive)).code in (2, 3)
    assert outside(record.written, tmp_path / "run") == []


@pytest.mark.parametrize("where", ["..", "../other", "/absolute", "link"])
def test_an_index_cannot_name_weights_elsewhere(
    where: str, tiny_model_folder: Path, tmp_path: Path, words: Any, call: Any
):
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(tiny_model_folder, model)
    other.mkdir()
    (model / "model.safetensors").rename(other / "model.safetensors")
    shutil.copy(other / "model.safetensors", tmp_path / "model.safetensors")
    name = {"/absolute": str(other / "model.safetensors"), "link": "inside"}.get(where, f"{where}/model.safetensors")
    if where == "link":
        (model / "inside").symlink_to(other)
        name = "inside/model.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    said = call(*words(model=model))
    assert said.code == 2
    assert "outside" in said.text


def test_a_link_as_output_leads_to_the_one_folder_it_names(tmp_path: Path, watched: Any, words: Any, call: Any):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with watched() as record:
        assert call(*words()).code == 0
    assert outside(record.written, tmp_path / "real", tmp_path / "run") == []
    assert (tmp_path / "real" / "final" / "model.safetensors").exists()


def test_a_link_in_the_output_is_replaced_and_not_followed(tmp_path: Path, words: Any, call: Any):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("final", ".tmp-final", ".old-final"):
        (tmp_path / "run" / name).symlink_to(precious)
    call(*words())
    assert [path.name for path in precious.iterdir()] == ["model.safetensors"]
    assert (precious / "model.safetensors").read_text() == "mine"
