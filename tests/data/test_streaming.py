"""Rows that are read only as far as a run needs, and C4's stand-in."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.dataset_hub import dataset_hub
from tests.data.tiny import chat_tokenizer
from training_hub.data.feed import Feed, FeedSettings
from training_hub.data.pipeline import ROWS_PER_CHUNK
from training_hub.data.prepare import Prepared, prepare
from training_hub.errors import RecipeError
from training_hub.frontends.forge.c4 import ROWS, stand_in, texts
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.load import build, dump

ROOT = Path(__file__).parents[2]
TOKENIZER = chat_tokenizer()
BLOCK, BATCH = 64, 4


def endless() -> Iterator[dict[str, Any]]:
    for number, text in enumerate(itertools.cycle(texts())):
        yield {"text": f"{number} {text}"}


def recipe_of(folder: Path, steps: int | None = 3, **data: Any) -> Recipe:
    chosen = {
        "path": "?", "cache_dir": str(folder / "cache"), "workers": 0, "format": "text", "pretraining": True,
        "streaming": True, "block_size": BLOCK, **data,
    }  # fmt: skip
    training = {"max_seq_len": BLOCK, "global_batch_size": BATCH, **({"steps": steps} if steps else {})}
    return build({"output": "out", "model": {"path": "m"}, "data": chosen, "training": training})


def prepared(recipe: Recipe, **live: Any) -> Prepared:
    return prepare(recipe, tokenizer=TOKENIZER, template=None, console=open_console("off"), **live)


def test_an_endless_source_is_read_as_far_as_the_steps_need(tmp_path: Path):
    pulled = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal pulled
        for row in endless():
            pulled += 1
            yield row

    made = prepared(recipe_of(tmp_path, steps=200), rows=counted())
    assert len(made.train) >= 200 * BATCH
    # What stops the reading is a chunk that brings enough.
    assert pulled <= 3 * ROWS_PER_CHUNK
    assert made.report["rows"] == pulled


def test_a_file_is_read_no_further_either_and_what_was_read_is_kept(tmp_path: Path):
    file = stand_in(tmp_path)
    recipe = recipe_of(tmp_path, path=str(file))
    first = prepared(recipe)
    assert first.report["rows"] == ROWS_PER_CHUNK < ROWS
    assert len(first.train) >= 3 * BATCH
    again = prepared(recipe)
    assert again.train.fingerprint == first.train.fingerprint
    whole = prepared(recipe_of(tmp_path, path=str(file), streaming=False))
    assert whole.report["rows"] == ROWS


CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: [en/00.jsonl, en/01.jsonl, en/02.jsonl]
---
"""

READ_FROM_HUB = """
import json, sys
from training_hub.data.prepare import prepare
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.monitoring.console import open_console
from training_hub.recipe.load import load_file
recipe, tokenizer = load_file(sys.argv[1]), ChatTokenizer.load(sys.argv[2])
for _ in range(2):
    made = prepare(recipe, tokenizer=tokenizer, template=None, console=open_console("plain", sys.stderr))
    print(json.dumps([made.report["rows"], len(made.train), made.train.fingerprint]))
"""


def test_a_data_set_on_the_hub_is_a_stream_and_known_again(tmp_path: Path, tiny_model_folder: Path):
    """Of three files only the first is read; the second time what was tokenised is found by the commit."""
    rows = [json.dumps({"text": text}) for text in itertools.islice(texts(), 900)]
    shards = {f"en/0{n}.jsonl": "\n".join(rows[300 * n : 300 * n + 300]).encode() for n in range(3)}
    (tmp_path / "recipe.yaml").write_text(dump(recipe_of(tmp_path, path="owner/texts:en")))
    with dataset_hub("owner/texts", {"README.md": CARD, **shards}) as (address, read):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", READ_FROM_HUB, str(tmp_path / "recipe.yaml"), str(tiny_model_folder)],
            env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, again = map(json.loads, done.stdout.splitlines())
    assert first[0] == ROWS_PER_CHUNK
    assert first[1] >= 3 * BATCH
    assert {path for path in read if path.startswith("en/")} == {"en/00.jsonl"}
    assert again == first
    assert "tokenised before, taken from" in done.stderr


def test_of_conversations_as_many_samples_are_read(tmp_path: Path, chat_file: Path):
    lines = [json.dumps({"text": f"row {number}"}) for number in range(2000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    made = prepared(recipe_of(tmp_path, 100, path=str(tmp_path / "rows.jsonl"), pretraining=False, block_size=None))
    assert 100 * BATCH <= len(made.train) < 100 * BATCH + ROWS_PER_CHUNK


def test_processes_and_runs_that_go_on_see_the_same_steps(tmp_path: Path):
    """The steps are a function of what was read and the seed: two processes have one process's samples between them,
    and step 3 is the same whoever asks for it, and when."""
    store = prepared(recipe_of(tmp_path), rows=endless()).train
    feed = Feed(store, FeedSettings(samples_per_step=BATCH, token_budget=BLOCK, seed=1, steps=3))
    again = Feed(prepared(recipe_of(tmp_path), rows=endless()).train, feed.settings)
    for step in (1, 2, 3):
        alone = feed.batch(step)
        parts = [again.batch(step, rank, 2) for rank in (0, 1)]
        of_both = sorted(number for part in parts for pack in part.packs for number in pack.samples.tolist())
        assert of_both == sorted(number for pack in alone.packs for number in pack.samples.tolist())


def test_validation_is_cut_to_as_many_samples(tmp_path: Path):
    file = stand_in(tmp_path)
    made = prepared(recipe_of(tmp_path, path=str(file), validation=str(file), validation_samples=5))
    assert made.validation is not None
    assert len(made.validation) == 5
    assert np.all(made.validation.lengths == BLOCK)


def test_reading_some_is_refused_where_all_are_needed(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"data.streaming: reads as far as training.steps needs, which is not given"):
        recipe_of(tmp_path, steps=None)
    with pytest.raises(RecipeError, match=r"data\.deduplicate: true needs all rows"):
        recipe_of(tmp_path, deduplicate=True)
    with pytest.raises(RecipeError, match=r"data.validation_fraction: 0.1 needs all rows.*Give a file"):
        recipe_of(tmp_path, validation_fraction=0.1)
    with pytest.raises(RecipeError, match=r"data.streaming: reads one source from its beginning"):
        recipe_of(tmp_path, path=["a.jsonl", "b.jsonl"])
    with pytest.raises(RecipeError, match=r"data.validation_samples: 5 needs validation rows"):
        recipe_of(tmp_path, validation_samples=5)


def test_the_stand_in_is_the_same_everywhere(tmp_path: Path):
    first, second = stand_in(tmp_path / "a"), stand_in(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    assert len(rows) == ROWS
    assert len({row["text"] for row in rows}) == ROWS
