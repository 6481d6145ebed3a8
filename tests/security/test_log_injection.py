"""Text from data reaches terminals, logs and pages escaped and cut, never as commands for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CODES = "\x1b[2J\x1b]0;owned\x07\x1b[31mred\x9b31m"
LINES = "a\r\nerror: all is well\n\x0bb\x0c\u2028c\u2029\x85"
ORDER = "\u202eabc\u2066"
BELL = "\x07\x08\x7f\x00"
ATTACKS = {"codes": CODES, "lines": LINES, "order": ORDER, "bell": BELL, "long": "x" * 10_000_000}
MARKUP = "<script>alert(1)</script>[bold red]"
HARMFUL = set("\x00\x07\x08\x0b\x0c\r\x1b\x7f\x85\x9b\u2028\u2029\u202e\u2066")


def rows_with(attack: str) -> dict[str, Any]:
    good = {"role": "assistant", "content": "Yes."}
    return {
        "role": {"messages": [{"role": attack, "content": "Hi."}, good]},
        "column": {attack: "Hi."},
        "key": {"messages": [{"role": "user", "content": "Hi.", attack: 1}, good]},
        "part": {"messages": [{"role": "user", "content": [{"type": attack}]}, good]},
        "no JSON": "{" + attack.replace("\n", " "),
    }


def is_safe(text: str) -> bool:
    return not HARMFUL & set(text) and all(len(line.encode()) < 4096 for line in text.split("\n"))


SAID = [pytest.param(place, name) for place in ("role", "column", "key", "part", "no JSON") for name in ATTACKS]


@pytest.mark.parametrize("place, name", SAID)
def test_a_row_cannot_speak_to_the_terminal(place: str, name: str, tmp_path: Path, words: Any, call: Any):
    row = rows_with(ATTACKS[name])[place]
    file = tmp_path / "rows.jsonl"
    file.write_text((row if isinstance(row, str) else json.dumps(row)) + "\n", encoding="utf-8")
    said = call(*words(data=file))
    assert said.code in (0, 3), said.text[:500]
    assert is_safe(said.text)
    assert "\nerror: all is well" not in said.text


@pytest.mark.parametrize("name", ["codes", "lines", "order"])
def test_a_name_of_a_file_cannot_speak_to_the_terminal(name: str, tmp_path: Path, words: Any, call: Any):
    file = tmp_path / f"{ATTACKS[name]}.jsonl"
    file.write_text('{"prompt": "What?", "completion": "This."}\n' * 2, encoding="utf-8")
    assert is_safe(call(*words(data=file)).text)
    file.write_text("{broken\n", encoding="utf-8")
    assert is_safe(call(*words(data=file, output=tmp_path / "second")).text)


def test_a_page_shows_markup_as_text(tmp_path: Path, words: Any, call: Any):
    file = tmp_path / f"{MARKUP.replace('/', '')}.jsonl"
    file.write_text(json.dumps({"prompt": MARKUP, "completion": MARKUP}) + "\n")
    assert call(*words(data=file)).code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page


def test_metrics_are_one_line_per_step_whatever_the_rows_say(tmp_path: Path, words: Any, call: Any):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": CODES + LINES, "completion": LINES + CODES}) + "\n")
    assert call(*words("--training.steps=3", data=file)).code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
