"""Kept tokens: how much room they take, what goes first, and what stays because it is in use."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.test_prepare import Heard, jsonl, recipe_of, run, talk
from tests.data.tiny import chat_tokenizer
from training_hub.data.cache import Cache, prune
from training_hub.data.prepare import Prepared
from training_hub.data.tokenizer import ChatTokenizer

pytest.importorskip("fcntl", reason="without file locks nothing is removed")


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return chat_tokenizer()


def kept(folder: Path) -> list[Path]:
    return sorted(path.parent for path in (folder / "cache").glob("*/*/ids.bin"))


def make(folder: Path, name: str, tokenizer: ChatTokenizer, heard: Heard | None = None, **data: float) -> Prepared:
    path = jsonl(folder / f"{name}.jsonl", [talk(len(name) * 100 + number) for number in range(40)])
    return run(recipe_of(path, folder, **data), tokenizer, heard)


def used(folder: Path, seconds_ago: int) -> None:
    file = folder.parent / f".use-{folder.name}"
    moment = file.stat().st_mtime - seconds_ago
    os.utime(file, (moment, moment))


def test_what_was_not_used_for_longest_goes_first_and_that_is_said(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    folders = []
    for ago, name in ((300, "a"), (200, "bb"), (100, "ccc")):
        before = kept(tmp_path)
        make(tmp_path, name, tokenizer)
        folders += [folder for folder in kept(tmp_path) if folder not in before]
        used(folders[-1], ago)
    gc.collect()
    make(tmp_path, "a", tokenizer)  # used again: now the second is the oldest
    size = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    gc.collect()
    heard = Heard()
    prune(Cache(tmp_path / "cache", size - 1), heard)
    assert kept(tmp_path) == sorted([folders[0], folders[2]])
    assert "more than data.cache_size" in heard and "removed the 1 not used for longest" in heard


def test_a_run_that_makes_tokens_prunes_those_of_others_and_not_its_own(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    make(tmp_path, "a", tokenizer)
    (old,) = kept(tmp_path)
    gc.collect()
    heard = Heard()
    prepared = make(tmp_path, "bb", tokenizer, heard, cache_size=1e-6)
    (new,) = kept(tmp_path)
    assert new != old and prepared.train.folder == new
    assert "all in use; data.cache_size is exceeded" in heard
    assert len(prepared.train[0]) > 0


def test_what_killed_processes_left_counts_and_goes_too(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    make(tmp_path, "a", tokenizer)
    (folder,) = kept(tmp_path)
    left = folder.with_name(f".tmp-{'0' * 64}")
    left.mkdir()
    (left / "ids.bin").write_bytes(bytes(10_000_000))
    os.utime(left / "ids.bin", (1, 1))
    prune(Cache(tmp_path / "cache", 5e6), Heard())
    assert not left.exists() and kept(tmp_path) == [folder]


USER = """
import sys
from pathlib import Path
from tests.data.test_cache import *
prepared = make(Path(sys.argv[1]), "a", chat_tokenizer())
print("ready", flush=True)
sys.stdin.readline()
print(len(prepared.train[0]))
"""


def test_what_another_process_uses_stays_until_that_ends(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1)
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    ) as user:  # fmt: skip
        assert user.stdin is not None and user.stdout is not None
        assert user.stdout.readline() == "ready\n"
        prune(cache, Heard())
        assert len(kept(tmp_path)) == 1
        user.stdin.write("\n")
        user.stdin.close()
        assert int(user.stdout.readline()) > 0
    prune(cache, Heard())
    assert kept(tmp_path) == []


def test_reading_files_to_recognise_them_shows_how_far_it_is(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    heard = Heard()
    make(tmp_path, "a", tokenizer, heard)
    make(tmp_path, "a", tokenizer, heard)
    for what in (f"recognising {tmp_path / 'a.jsonl'}", "checking kept tokens"):
        total, done = heard.progressed[what]
        assert total is not None and 0 < done <= total * 1.001
