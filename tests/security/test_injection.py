"""Text in settings stays text: it starts nothing, and arrives byte for byte or is refused."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.imports import modules
from training_hub.errors import RecipeError
from training_hub.frontends.cli import recipe_of
from training_hub.recipe.findings import value_at
from training_hub.recipe.load import dump, load
from training_hub.recipe.names import all_settings

NEEDED = ["sft", "--model", "m", "--data", "d", "--output", "o", "monitoring.wandb=true", "monitoring.mlflow=true"]
TEXTS = (
    *("; touch canary", "$(touch canary)", "`touch canary`", "| touch canary", "a && touch canary", "a\ntouch canary"),
    *("--config=/etc/passwd", "-rf", "'; touch canary; '", '"; touch canary; "', "a\0b", "a\udcff\udcfeb"),
    *("%s%n{0}", "{{ 7 * 7 }}", "${HOME}", "~nobody-there", "a\r\nb", "\x1b]0;title\x07"),
)
MAY_BE_REFUSED = ("\0", "\udcff", "\x1b", "~nobody")
READ_FROM = (
    *("data.path", "data.validation", "data.chat_template", "data.cache_dir", "model.path", "model.tokenizer"),
    *("model.revision", "output", "monitoring.tensorboard", "distillation.teacher"),
)


def text_settings() -> list[str]:
    return [
        path
        for path, setting in all_settings().items()
        if setting.takes_text and not (setting.takes_list or setting.takes_number or setting.takes_boolean)
        if path not in ("algorithm", "backend", "evaluation.best_metric", "hub.repo_id", "checkpoint.max_shard_size")
    ]


def test_every_text_arrives_byte_for_byte_or_is_refused():
    tried = 0
    for path in text_settings():
        command = "lora-sft" if path.startswith("lora.") else "sft"
        for text in TEXTS:
            tried += 1
            try:
                recipe = recipe_of([command, *NEEDED[1:], "--distillation.teacher=t", f"--{path}={text}"])
            except RecipeError:
                assert any(mark in text for mark in MAY_BE_REFUSED), (path, text)
                continue
            assert value_at(recipe, path) == text
            if "\udcff" not in text:
                assert load(dump(recipe)) == recipe
    assert tried >= 200


def test_keys_and_values_of_mappings_arrive_byte_for_byte():
    for path in ("data.columns", "data.roles"):
        for text in TEXTS:
            if not any(mark in text for mark in MAY_BE_REFUSED):
                assert value_at(recipe_of([*NEEDED, f"--{path}.text={text}"]), path) == {"text": text}


@pytest.mark.parametrize("path", READ_FROM)
def test_a_command_with_such_a_text_runs_nothing_and_ends_in_our_error(
    path: str, tmp_path: Path, watched: Any, words: Any, call: Any, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    for text in TEXTS:
        # Without rows the run ends before it begins, whatever this setting does.
        rest = [] if path == "data.path" else [f"--data={tmp_path / 'nowhere.jsonl'}"]
        with watched() as record:
            said = call(*words(*rest, f"--{path}={text}"))
        assert said.code in (2, 3, 4, 5), (text, said.text)
        assert record.programs == [], text
        assert not (tmp_path / "canary").exists()


def test_no_code_of_ours_starts_a_shell():
    found = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                shell = any(word.arg == "shell" for word in node.keywords)
                if shell or called in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
                    found.append(f"{module.path.name}:{node.lineno} {called}")
    assert found == []
