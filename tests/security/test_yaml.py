"""A recipe file is data: it runs nothing, cannot be made to grow, and says what it looks like."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from training_hub.recipe.yaml_text import read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
QUADRATIC = "a: &a " + "x" * 20_000 + "\nb: [" + ", ".join(["*a"] * 15_000) + "]\n"
TAGS = (
    *("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"),
    *("!!python/object:os.mkdir", "!!python/module:os", "!!python/tuple", "!!python/bytes", "!!python/none"),
    *("!os.mkdir", "!<tag:yaml.org,2002:python/object/apply:os.mkdir>", "!!binary", "!!set", "!!omap", "!!timestamp"),
)

REFUSED = {
    **{f"tag {tag}": f"output: {tag} [CANARY]\n" for tag in TAGS},
    "billion laughs": LAUGHS,
    "long text, many times": QUADRATIC,
    "alias that holds itself": "a: &a {b: *a}\n",
    "merge of itself": "a: &a\n  <<: *a\n",
    "scalar of 10 MB": "output: " + "x" * 10_000_000,
    "comment of 10 MB": "#" + "x" * 10_000_000,
    "deep lists": "[" * 100_000,
    "deep mappings": "{a: " * 10_000,
    "deep blocks": "".join(" " * depth + "a:\n" for depth in range(200)),
    "key given twice": "output: a\noutput: b\n",
    "key given twice in a section": "model:\n  path: a\n  path: b\n",
    "section given twice": "model: {path: a}\nmodel: {path: b}\n",
    "one setting in two spellings": "training:\n  steps: 1\n  max_steps: 2\n",
    "two documents": "output: a\n---\noutput: b\n",
    "zero byte": "output: a\0b\n",
    "terminal codes": "output: \x1b[2Ja\n",
    "list as key": "? [a]\n: b\n",
    "Norway": "model: {path: no}\n",
    "text for a number": "optimizer: {lr: '1e-5'}\n",
    "infinite number": "optimizer: {lr: .inf}\n",
    "no number": "optimizer: {lr: .nan}\n",
    "octal": "training: {steps: 010}\n",
    "hexadecimal": "training: {steps: 0x10}\n",
    "boolean for a number": "training: {steps: yes}\n",
    "time for a number": "training: {steps: 12:30}\n",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_recipe_is_refused_at_once(name: str, tmp_path: Path, words: Any, call: Any):
    canary, file = tmp_path / "canary", tmp_path / "recipe.yaml"
    file.write_text(REFUSED[name].replace("CANARY", str(canary)), encoding="utf-8")
    began = time.process_time()
    said = call("sft", f"--config={file}")
    assert said.code == 2
    assert time.process_time() - began < 4
    assert not canary.exists()
    assert len(said.text) < 20_000
    assert "\x1b" not in said.text


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("1E-5", 1e-5), ("5e5", 5e5), ("2.5e-6", 2.5e-6), ("3", 3)])
def test_numbers_are_numbers(text: str, value: float):
    assert read_yaml(f"optimizer: {{lr: {text}}}") == {"optimizer": {"lr": value}}
