"""The pages of this project are true: their snippets run, against a tiny model and small files of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.documents.snippets import blocks, run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "scaling.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(page for page in OTHERS if page not in PAGES)]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
TEMPLATE = ROOT / "training_hub" / "data" / "templates" / "chatml.jinja"


@pytest.fixture
def folder(tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the files that the pages speak of."""
    (tmp_path / "chat.jsonl").write_bytes(chat_file.read_bytes())
    (tmp_path / "own.jinja").write_bytes(TEMPLATE.read_bytes())
    said = [{"who": "human", "said": "What comes after 4?"}, {"who": "bot", "said": "5."}]
    (tmp_path / "dialogues.jsonl").write_text(json.dumps({"turns": said}) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run(page: Path, folder: Path, tiny_model_folder: Path, tiny_teacher_folder: Path):
    names = {"path/to/model": str(tiny_model_folder), "path/to/teacher": str(tiny_teacher_folder)}
    ran = run_page(page, names, folder)
    runnable = [block for block in blocks(page) if block.is_run and block.language in ("python", "bash", "sh")]
    assert bool(ran) == bool(runnable), f"nothing of {page.name} was run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_shown_as_json_or_yaml_can_be_read(page: Path):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        if block.language in ("yaml", "yml"):
            yaml.safe_load(block.text)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    targets = [page.parent / target for target in LINK.findall(page.read_text(encoding="utf-8"))]
    assert not [target for target in targets if not target.exists()]


def test_the_three_ways_of_the_readme_to_write_one_run_give_one_recipe(folder: Path, tiny_model_folder: Path):
    run_page(ROOT / "README.md", {"path/to/model": str(tiny_model_folder), " --training.epochs=1 seed=7": ""}, folder)
    settled = ("output", "backend", "checkpoint")
    recipes = []
    for output in ("out", "out-flags", "out-yaml"):
        recipe = yaml.safe_load((folder / output / "recipe.yaml").read_text(encoding="utf-8"))
        recipes.append({key: value for key, value in recipe.items() if key not in settled})
    assert recipes[1] == recipes[2]
    assert recipes[0]["model"] == recipes[1]["model"]
    assert recipes[0]["optimizer"] == recipes[1]["optimizer"]
    assert recipes[0]["training"]["global_batch_size"] == recipes[1]["training"]["global_batch_size"] == 16


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_whole_recipe_that_runs(
    path: Path, folder: Path, chat_file: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from training_hub.frontends.cli import main

    monkeypatch.chdir(folder)
    small = [f"--model={tiny_model_folder}", f"--data={chat_file}", f"--validation={chat_file}", "--steps=2"]
    assert main(["sft", "--config", str(path), *small, "--output", str(folder / "example")]) == 0
    assert (folder / "example" / "final" / "model.safetensors").is_file()
