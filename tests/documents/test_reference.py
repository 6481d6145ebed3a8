"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import training_hub
from training_hub.recipe import Recipe
from training_hub.recipe.names import all_settings, sections

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(generator: ModuleType, tmp_path: Path):
    guide = (ROOT / "docs" / "guides" / "trainer.md").read_text(encoding="utf-8")
    assert guide == generator.trainer_page(guide), "run: python docs/make_reference.py"
    generator.write(tmp_path)
    for name in ("recipe.md", "cli.md"):
        kept = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
        assert kept == (tmp_path / name).read_text(encoding="utf-8"), "run: python docs/make_reference.py"


def test_every_section_and_every_field_has_a_docstring():
    for part in (Recipe, *sections().values()):
        assert (part.__doc__ or "").strip().endswith(".")
    assert [path for path, setting in all_settings().items() if not setting.doc.endswith((".", "}."))] == []


def test_every_setting_is_on_both_pages(generator: ModuleType):
    recipe, cli = generator.recipe_page(), generator.cli_page()
    for path in all_settings():
        assert f"### `{path}`" in recipe
        assert f"`--{path}`" in cli or path == "algorithm"


def test_every_public_name_can_be_imported_and_no_other():
    for name in training_hub.__all__:
        assert getattr(training_hub, name) is not None
    assert dir(training_hub) == sorted(training_hub.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sftt'"):
        _ = training_hub.sftt
