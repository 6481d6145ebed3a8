"""The JSON Schema describes every setting, and accepts what the recipe accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from training_hub.recipe import Recipe
from training_hub.recipe.load import build, dump
from training_hub.recipe.names import SPELLINGS, all_settings
from training_hub.recipe.schema import json_schema
from training_hub.recipe.yaml_text import read_yaml

KNOWN = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "items", "maximum", "minimum", "properties", "required", "title", "type",
}  # fmt: skip


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema inside a schema."""
    yield schema
    for key in ("properties", "$defs"):
        for inner in schema.get(key, {}).values():
            yield from parts(inner)
    for inner in [*schema.get("anyOf", []), *(schema[key] for key in ("items",) if key in schema)]:
        yield from parts(inner)


def property_at(schema: dict[str, Any], path: str) -> dict[str, Any]:
    section, _, field = path.rpartition(".")
    if not section:
        return schema["properties"][field]
    return schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]["properties"][field]


def test_every_setting_and_every_spelling_is_described():
    schema = json_schema()
    for path, setting in all_settings().items():
        assert property_at(schema, path)["description"] == setting.doc
    for other, path in SPELLINGS.items():
        assert property_at(schema, other)["description"] == f"The same as {path}."


def test_only_words_of_json_schema_are_used():
    assert {key for part in parts(json_schema()) for key in part} <= KNOWN


def test_choices_limits_and_defaults_are_there():
    schema = json_schema()
    assert property_at(schema, "checkpoint.resume")["enum"] == ["auto", "restart", "never"]
    assert property_at(schema, "training.global_batch_size")["minimum"] == 1
    assert property_at(schema, "training.max_seq_len")["default"] == 4096


def test_a_recipe_file_may_leave_out_what_flags_give():
    schema = json_schema()
    assert "required" not in schema
    assert "required" not in schema["$defs"]["Model"]
    assert schema["$defs"]["DataSource"]["required"] == ["path"]


def test_the_schema_accepts_recipes_and_refuses_what_the_recipe_refuses():
    jsonschema = pytest.importorskip(
        "jsonschema", reason="jsonschema is not installed: pip install 'training-hub[test]'"
    )
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(validator.schema)
    recipe = build({"model.path": "m", "output": "o", "data.path": ["a", {"path": "b", "weight": 0.5}]})
    assert isinstance(recipe, Recipe)
    validator.validate(read_yaml(dump(recipe)))
    validator.validate({"training": {"seq_len": 8}})
    for wrong in ({"training": {"epochs": -1}}, {"trainig": {}}, {"optimizer": {"name": "adamw"}}):
        assert list(validator.iter_errors(wrong))
