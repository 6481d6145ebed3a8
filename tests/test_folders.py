"""A folder is whole or not there, and damage to it is found."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from training_hub.folders import damage, manifest, remove, tidy, write_json, write_whole


def make(folder, content: bytes = b"x" * 1000) -> None:
    with write_whole(folder, {"step": 3}) as aside:
        (aside / "a.bin").write_bytes(content)
        (aside / "sub").mkdir()
        (aside / "sub" / "b.txt").write_text("b")


def test_a_whole_folder_carries_size_and_sum_of_each_file(tmp_path):
    make(tmp_path / "one")
    assert damage(tmp_path / "one") == []
    assert set(manifest(tmp_path / "one")["files"]) == {"a.bin", "sub/b.txt"}
    assert manifest(tmp_path / "one")["step"] == 3


def test_an_exception_leaves_nothing_behind_and_the_old_folder_untouched(tmp_path):
    make(tmp_path / "one")
    with pytest.raises(RuntimeError, match="disk"), write_whole(tmp_path / "one", replace=True) as aside:
        (aside / "a.bin").write_bytes(b"half")
        raise RuntimeError("disk")
    assert damage(tmp_path / "one") == []
    assert sorted(os.listdir(tmp_path)) == ["one"]


def test_an_existing_folder_gives_way_only_when_asked(tmp_path):
    make(tmp_path / "one")
    with pytest.raises(FileExistsError):
        make(tmp_path / "one", b"new")
    with write_whole(tmp_path / "one", replace=True) as aside:
        (aside / "c").write_text("new")
    assert sorted(os.listdir(tmp_path / "one")) == ["c", "manifest.json"]
    assert sorted(os.listdir(tmp_path)) == ["one"]


@pytest.mark.parametrize("bit", [0, 777, 7999])
def test_one_flipped_bit_is_found_and_named(tmp_path, bit):
    make(tmp_path / "one")
    path = tmp_path / "one" / "a.bin"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    assert damage(tmp_path / "one") == [f"{path} has changed since it was written (sha256 differs)"]


def test_missing_and_shortened_files_and_manifests_are_found(tmp_path):
    make(tmp_path / "one")
    (tmp_path / "one" / "a.bin").write_bytes(b"x" * 999)
    (tmp_path / "one" / "sub" / "b.txt").unlink()
    assert [line.split(" ", 1)[1] for line in damage(tmp_path / "one")] == ["has 999 bytes, not 1,000", "is missing"]
    (tmp_path / "one" / "manifest.json").write_text("{")
    assert "cannot be read" in damage(tmp_path / "one")[0]
    (tmp_path / "one" / "manifest.json").unlink()
    assert "is missing" in damage(tmp_path / "one")[0]


SCRIPT = """
import os, sys
from pathlib import Path
from training_hub import folders

calls = 0
wanted = int(sys.argv[2])
def count(name):
    real = getattr(os, name)
    def counted(*arguments, **named):
        global calls
        calls += 1
        if calls == wanted:
            os._exit(9)
        return real(*arguments, **named)
    return counted
for name in ("fsync", "rename", "replace", "mkdir", "open"):
    setattr(os, name, count(name))
root = Path(sys.argv[1])
with folders.write_whole(root / "step-2") as aside:
    for i in range(3):
        (aside / f"{i}.bin").write_bytes(bytes(1000))
"""


def test_a_kill_at_any_system_call_leaves_a_whole_folder_or_none(tmp_path):
    outcomes = set()
    for call in range(1, 40):
        root = tmp_path / str(call)
        root.mkdir()
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), str(root), str(call)], timeout=300)
        folder = root / "step-2"
        assert not folder.exists() or damage(folder) == []
        outcomes.add((ended.returncode, folder.exists()))
        if ended.returncode == 0:
            break
    assert {(9, False), (9, True), (0, True)} <= outcomes


def test_json_is_replaced_in_one_go(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 1\n}\n'


def test_any_bit_flipped_in_the_manifest_itself_is_found(tmp_path):
    make(tmp_path / "one")
    path = tmp_path / "one" / "manifest.json"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        assert damage(tmp_path / "one") != [], f"bit {bit}: {bytes(flipped)!r}"
    path.write_bytes(content)
    assert damage(tmp_path / "one") == []


def test_tidying_removes_what_is_unfinished_and_gives_a_name_back_to_what_had_made_way(tmp_path):
    make(tmp_path / "step-1")
    make(tmp_path / "step-2")
    (tmp_path / "step-2").rename(tmp_path / ".old-step-2")  # killed between the two renames
    make(tmp_path / ".tmp-step-3")
    (tmp_path / ".tmp-result.json").write_text("{")
    tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    assert damage(tmp_path / "step-2") == []
    make(tmp_path / ".old-step-1")  # killed after both
    tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    tidy(tmp_path / "nowhere")


def test_removing_a_folder_first_takes_its_name_away(tmp_path):
    make(tmp_path / "one")
    remove(tmp_path / "one")
    assert os.listdir(tmp_path) == []
