"""`training-hub preview`: through the real command line, from a tokenizer's folder and a template file alone."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from training_hub.frontends.cli import main

EVIL = "</span><script>alert(1)</script> \u202e & <b>\"'\x1b[31m"
WEIGHTED = "What is half?"


@pytest.fixture
def tokenizer_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer, and neither weights, config nor template."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_folder / name, folder / name)
    return folder


@pytest.fixture
def template_file(tiny_model_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "own.jinja"
    file.write_text((tiny_model_folder / "chat_template.jinja").read_text())
    return file


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Four rows: a plain one, one that weighs half, one that cannot be trained, one that is not harmless."""
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Two\nlines."}]
    half = [{"role": "user", "content": WEIGHTED}, {"role": "assistant", "content": "Half.", "train": 0.5}]
    unanswered = [{"role": "user", "content": "Anyone?"}]
    evil = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (plain, half, unanswered, evil)))
    return path


@pytest.fixture
def words(tokenizer_folder: Path, template_file: Path, rows_file: Path) -> list[str]:
    named = ["--model", str(tokenizer_folder), "--chat-template", str(template_file), "--data", str(rows_file)]
    return ["preview", *named, "--no-data.cache"]


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_row_is_an_object_and_the_counts_come_last(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "--json", "--rows", "9"]) == 0
    *rows, last = objects(capsys.readouterr().out)
    assert [set(row) >= {"row", "text", "ids", "tokens", "weights", "problems"} for row in rows] == [True] * 4
    for row in rows:
        assert row["text"] == "".join(row["tokens"])
        assert len(row["ids"]) == len(row["tokens"]) == len(row["weights"])
    assert [bool(row["problems"]) for row in rows] == [False, False, True, False]
    assert set(rows[1]["weights"]) == {0.0, 0.5}
    assert "Anyone?" in rows[2]["raw"]
    assert EVIL in rows[3]["text"]
    counts = last["counts"]
    assert (counts["rows"], counts["samples"], counts["problems"]) == (4, 3, 1)
    assert {"dropped", "truncated", "duplicates", "unrolled", "untrained_tokens"} <= set(counts)


def test_what_is_shown_is_what_a_run_trains(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    named = ["--model", str(tiny_model_folder), "--data", str(chat_file), "--data.cache_dir", str(tmp_path / "cache")]
    assert main(["preview", *named, "--json", "--rows", "64"]) == 0
    *rows, last = objects(capsys.readouterr().out)
    out = tmp_path / "out"
    assert main(["sft", *named, "--output", str(out), "--steps", "1", "--monitoring.console", "plain"]) == 0
    assert "tokenised before" in capsys.readouterr().out  # the run reads the very store that was shown
    plan = json.loads((out / "plan.json").read_text())
    assert sum(len(row["ids"]) for row in rows) == plan["tokens"] == last["counts"]["tokens"]
    assert sum(weight > 0 for row in rows for weight in row["weights"]) == plan["trained_tokens"]


def test_text_marks_what_is_trained_white_space_special_tokens_and_weights(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "--rows", "3"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[" not in text
    assert re.search(r"⟦T.*w│?o│↵\n│l.*«<\|im_end\|>»⟧", text)
    assert re.search(r"⟦0\.5:H.*«<\|im_end\|>»⟧", text)
    assert "«<|im_start|>»│user│↵" in text
    assert re.search(r"W[│hat]+·[│is]+", text)
    assert "problem: " in text
    assert re.search(r"^ +1  problems$", text, re.M)
    assert re.search(r"^ +4  rows read$", text, re.M)


def test_a_terminal_shows_colours_and_weights(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([*words, "--rows", "4"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[30;48;5;114m" in text  # trained
    assert "×0.5" in text
    assert "⟦" not in text
    assert "\x1b[31m" not in text.replace("\x1b[31mproblem", "")  # the colour in the data is escaped, not obeyed
    assert "\\x1b" in text


class Reader(HTMLParser):
    """Tags, attributes and the text of token spans of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if tag == "span" and "title" in given:
            self.titles.append(given["title"] or "")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_escapes_everything_and_has_each_token(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "page.html"
    assert main([*words, "--rows", "9", "--html", str(page), "--json"]) == 0
    *rows, _ = objects(capsys.readouterr().out)
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert "b" not in reader.tags
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert reader.addresses == []
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    wanted = [
        f"token {number}, id {one}, weight {weight:g}"
        for row in rows
        for number, (one, weight) in enumerate(zip(row["ids"], row["weights"], strict=True), start=1)
    ]
    assert reader.titles == wanted
    assert rows[2]["problems"][0] in unescape(text)


def test_a_row_is_chosen_by_its_line(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "--json", "--row", "2"]) == 0
    row, _ = objects(capsys.readouterr().out)
    assert row["row"].endswith("rows.jsonl line 2")
    assert WEIGHTED in row["text"]
    assert main([*words, "--row", "77"]) == 3
    assert "no row at line 77" in capsys.readouterr().err


def test_the_settings_are_those_of_a_recipe_file(
    words: list[str], tmp_path: Path, tokenizer_folder: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{tokenizer: '{tokenizer_folder}'}}\n"
        f"data: {{path: '{rows_file}', chat_template: chatml, cache: false}}\n"
    )
    assert main(["preview", "--config", str(file), "--json", "--row", "1", "data.unmask=true"]) == 0
    row, _ = objects(capsys.readouterr().out)
    assert row["weights"][row["tokens"].index("<|im_end|>")] == 1.0


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--rows", "-1"], 2, "--rows takes"),
        (["--rows", "many"], 2, "--rows: invalid int value"),
        (["--data.turn", "all"], 2, "Did you mean --data.turns?"),
        (["--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_errors(
    words: list[str], more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, *more]) == code
    assert said in capsys.readouterr().err


def test_without_a_tokenizer_the_model_is_asked_for(rows_file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["preview", "--data", str(rows_file)]) == 2
    assert capsys.readouterr().err == "error: model.path (--model): not given. Write --model MODEL_FOLDER\n"
