"""Scores: the answers are those of transformers' own greedy generation, and the loss is that of a validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.invariants.run import recipe, train
from training_hub.backends.torch_engine.answers.scoring import score
from training_hub.monitoring.console import SilentConsole


@pytest.fixture(scope="module")
def taught(tiny_model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained for long enough that it gets some of its rows right and others wrong."""
    output = tmp_path_factory.mktemp("taught") / "run"
    settings = {"training": {"steps": 150, "global_batch_size": 16, "preflight": False}, "optimizer": {"lr": 1e-2}}
    result = train(tiny_model_folder, chat_file, output, **settings)
    assert result.model_path is not None
    return result.model_path


def rows_of(path: Path, count: int) -> Path:
    """Short conversations as a test file; three have an answer that is wrong on purpose."""
    rows = [
        {"messages": [{"role": "user", "content": f"What comes after {n}?"}, {"role": "assistant", "content": answer}]}
        for n in range(count)
        for answer in [f"{n + 1}." if n % 4 else "a goose"]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def right_by_itself(folder: Path, file: Path) -> float:
    """The share of rows answered right, one row at a time, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    for asked, answer in rows:
        ids = tokenizer.apply_chat_template([asked], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.decode(made[0, ids["input_ids"].shape[1] :])
        right += said == answer["content"] + "<|im_end|>"
    return right / len(rows)


def test_answers_are_those_of_greedy_generation_row_by_row(taught: Path, tmp_path: Path):
    file = rows_of(tmp_path / "test.jsonl", 24)
    wanted = right_by_itself(taught, file)
    assert 0 < wanted < 1, "the score must be able to be too high and too low"
    asked = recipe(taught, file, tmp_path / "out")
    assert score(asked, SilentConsole(), generates=True)["exact_match"] == wanted


def test_a_model_that_is_saved_with_other_habits_is_still_asked_greedily(taught: Path, tmp_path: Path):
    file = rows_of(tmp_path / "test.jsonl", 24)
    habits = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    saved = json.loads((taught / "generation_config.json").read_text())
    (taught / "generation_config.json").write_text(json.dumps({**saved, **habits}))
    try:
        found = score(recipe(taught, file, tmp_path / "out"), SilentConsole(), generates=True)
    finally:
        (taught / "generation_config.json").write_text(json.dumps(saved))
    assert found["exact_match"] == right_by_itself(taught, file)


def test_the_loss_is_what_a_validation_of_the_same_rows_gives(taught: Path, chat_file: Path, tmp_path: Path):
    file = rows_of(tmp_path / "test.jsonl", 12)
    validated = {"data": {"validation": str(file)}, "training": {"steps": 1, "preflight": False}}
    before = train(taught, chat_file, tmp_path / "run", **validated).metrics["validation_loss_before"]
    found = score(recipe(taught, file, tmp_path / "out"), SilentConsole(), generates=False)
    # float32; the same sums over other packs.
    assert found["loss"] == pytest.approx(before, rel=1e-5)
    assert found["rows"] == 12 and "exact_match" not in found
