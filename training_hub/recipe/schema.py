"""The JSON Schema of a recipe file, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from training_hub.recipe.names import SPELLINGS
from training_hub.recipe.recipe import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Every setting with description, type, limits, choices and default; other spellings stand beside their setting.

    Nothing is demanded of a file, since flags may give what it leaves out.
    """
    schema = Recipe.model_json_schema()
    schema.pop("required", None)
    for name, section in schema["$defs"].items():
        section.pop("title", None)
        if name != "DataSource":
            section.pop("required", None)
    places = {"": schema["properties"]} | {
        name: schema["$defs"][_definition(part)]["properties"]
        for name, part in schema["properties"].items()
        if _definition(part)
    }
    for other, path in SPELLINGS.items():
        section, _, field = path.rpartition(".")
        other_section, _, other_field = other.rpartition(".")
        meant = places[section][field]
        places[other_section][other_field] = meant | {"description": f"The same as {path}."}
    _tidy(schema)
    return {"$schema": DIALECT, **schema, "title": "training_hub recipe"}


def _definition(part: dict[str, Any]) -> str:
    """The name of the section that a property holds, "" where it holds a value."""
    return part.get("$ref", "").rpartition("/")[2]


# pydantic leaves limits that stand behind a validator under their Python names.
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _tidy(part: Any) -> None:
    """One line per description; no titles, which only repeat the keys; limits in the words of JSON Schema."""
    if isinstance(part, list):
        for item in part:
            _tidy(item)
    if not isinstance(part, dict):
        return
    for key, value in list(part.items()):
        if key in LIMITS:
            part[LIMITS[key]] = part.pop(key)
        elif key == "allow_inf_nan" or (key == "title" and isinstance(value, str)):
            del part[key]
        elif key == "description" and isinstance(value, str):
            part[key] = " ".join(value.split())
        else:
            _tidy(value)
