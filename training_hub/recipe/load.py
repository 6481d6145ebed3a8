"""From what the caller wrote to a Recipe: YAML, `a.b=c` overrides and flat settings, with every problem found at once.

    YAML text -> read_yaml -> layer_of ┐
    a.b=c     -> overrides -----------┴-> merge -> build -> Recipe -> dump -> YAML text

A Layer holds the settings of one place by recipe path. Later layers win, setting by setting.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training_hub.errors import RecipeError
from training_hub.recipe.check import contradictions, unmet
from training_hub.recipe.findings import Names, value_at
from training_hub.recipe.names import (
    REQUIRED,
    Setting,
    all_settings,
    nearest_setting,
    owner_of,
    resolve,
    sections,
)
from training_hub.recipe.recipe import TOLD_BY_CALLER, Recipe
from training_hub.recipe.translate import missing, problems_of, shown, unknown
from training_hub.recipe.yaml_text import read_yaml, write_yaml


@dataclass(frozen=True)
class Layer:
    """Settings from one place.

    values: by recipe path; `data.roles.bot` adds to the mapping `data.roles`. spelled: how the caller wrote a path,
    where differently. problems: what is wrong already, one line each (unknown names, a setting given twice).
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def layer_of(tree: Any, name: str = "the recipe") -> Layer:
    """The settings of a nested mapping as YAML gives it; keys may also be dotted. `name` is what errors call it."""
    if tree is None:
        return Layer()
    if not isinstance(tree, Mapping):
        return Layer(problems=(f"{name}: found {_kind(tree)}; a recipe is a mapping such as `model: {{path: ...}}`.",))
    return collect(_leaves(tree, ""))


def collect(assignments: Iterable[tuple[str, Any]], *, again: bool = False) -> Layer:
    """The layer that (name, value) pairs make, in any accepted spelling. `again`: the last of several counts."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    problems: list[str] = []
    for name, value in assignments:
        path = resolve(name)
        if path is None:
            problems.append(_not_a_setting(name, value))
            continue
        if path in values and not again:
            first = spelled.get(path, path)
            problems.append(f"{path}: given twice, as {first} and as {name}. Keep one.")
            continue
        values[path] = value
        spelled.pop(path, None)
        if name != path:
            spelled[path] = name
    return Layer(values, spelled, tuple(problems))


def overrides(assignments: Iterable[str]) -> Layer:
    """The layer of `a.b=c` texts, with or without `--` in front. The last one given for a setting counts."""
    pairs: list[tuple[str, Any]] = []
    problems: list[str] = []
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--")
        if not equals:
            problems.append(f"{text}: not an override; write it as {name or 'training.epochs'}=VALUE.")
            continue
        try:
            pairs.append((name, read_value(name, value)))
        except RecipeError as error:
            problems += error.problems
    layer = collect(pairs, again=True)
    return replace(layer, problems=(*problems, *layer.problems))


def read_value(name: str, text: str) -> Any:
    """The value that `text`, as typed on a command line, gives the setting `name`.

    A text setting gets its text as it is, byte for byte, but for null and for a list where these are taken. All
    others are read as YAML.
    """
    path = resolve(name)
    setting = owner_of(path) if path else None
    if setting is None:
        return text  # collect() says that there is no such setting
    if path != setting.path:
        return text if setting.annotation == dict[str, str] else read_yaml(text, name)
    return _read_text(setting, text) if setting.takes_text else read_yaml(text, name)


def merge(*layers: Layer) -> Layer:
    """One layer in which later ones win. A mapping given whole replaces the earlier one; a key of it adds to it."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for layer in layers:
        for path, value in layer.values.items():
            for inner in [key for key in values if key.startswith(path + ".")]:
                del values[inner]
                spelled.pop(inner, None)
            values[path] = value
            spelled.pop(path, None)
        spelled |= layer.spelled
    return Layer(values, spelled, tuple(line for layer in layers for line in layer.problems))


def build(
    settings: Mapping[str, Any],
    *,
    spelled: Mapping[str, str] | None = None,
    problems: Iterable[str] = (),
    required: Iterable[str] = (),
    live: Collection[str] = (),
) -> Recipe:
    """The recipe that `settings` (nested, or flat by path) describe.

    spelled: the caller's own names, for errors. problems: findings so far, told together with the new ones. required:
    paths that must not be null or empty. live: paths that a live object stands in for.
    Raises RecipeError listing everything that is wrong.
    """
    layer = layer_of(settings)
    names = Names({**layer.spelled, **(spelled or {})})
    found = [*problems, *layer.problems]
    values = {path: _as_chosen(path, _plain(value)) for path, value in layer.values.items()}
    recipe, wrong, bad = _validate(values, names)
    found += wrong
    absent = [path for path in required if path not in {*bad, *live} and value_at(recipe, path) in (None, "", [])]
    found += [missing(path, names) for path in absent]
    # A contradiction with a setting that is wrong itself may vanish once that is put right.
    at_odds = [*contradictions(recipe, names), *unmet(recipe, names, live)]
    found += [one.message for one in at_odds if not bad.intersection(one.paths)]
    if found:
        raise RecipeError(found)
    return recipe


def load(text: str, name: str = "the recipe") -> Recipe:
    """The recipe that `dump` wrote, or any complete YAML text, exactly. Raises RecipeError."""
    layer = layer_of(read_yaml(text, name), name)
    # A saved recipe may be of a run that was handed live rows, which no file can name.
    return build(layer.values, spelled=layer.spelled, problems=layer.problems, live=("data.path", "data.validation"))


def load_file(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError."""
    return load(read_text(path), str(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a recipe file. Raises RecipeError where it cannot be read as text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a text file: {error}.") from error


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML; `load(dump(recipe)) == recipe`."""
    return write_yaml(recipe.model_dump(mode="python"))


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """The (dotted name, value) pairs of a nested mapping; only sections are opened, not mappings that are values."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in sections() and isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        elif name in sections() and value is None:
            continue  # `training:` with nothing under it
        else:
            yield name, value


def _not_a_setting(name: str, value: Any) -> str:
    if name in sections():
        first = next(iter(sections()[name].model_fields))
        return f"{name}: found {_kind(value)}; it is a section. Write its settings under it, such as {name}.{first}."
    return unknown(name, nearest_setting(name))


def _validate(values: Mapping[str, Any], names: Names) -> tuple[Recipe, list[str], set[str]]:
    """The recipe of `values`, or of those that are right with stand-ins for the rest; problems; wrong paths."""
    try:
        return Recipe.model_validate(_nest(values), context=TOLD_BY_CALLER), [], set()
    except ValidationError as error:
        lines, bad = problems_of(error, names)
    rest = {path: value for path, value in values.items() if not any(_is_at_or_in(path, one) for one in bad)}
    stand_ins = {path: "?" for path, setting in all_settings().items() if setting.default is REQUIRED}
    return Recipe.model_validate(_nest({**stand_ins, **rest}), context=TOLD_BY_CALLER), lines, bad


def _is_at_or_in(path: str, setting: str) -> bool:
    return path == setting or path.startswith(setting + ".")


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested form of flat settings, keys of mappings put into them."""
    tree: dict[str, Any] = {}
    for path in sorted(values, key=len):  # a mapping before the keys that are added to it
        setting = owner_of(path)
        assert setting is not None, path  # resolve() let it in
        *parents, last = setting.path.split(".")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        if path == setting.path:
            place[last] = values[path]
        elif isinstance(place.setdefault(last, {}), dict):
            place[last] = {**place[last], path[len(setting.path) + 1 :]: values[path]}
    return tree


def _read_text(setting: Setting, text: str) -> Any:
    """The value of a setting that takes any text, and perhaps null, a list, a number or a boolean beside it."""
    if setting.takes_null and text.strip() in ("null", "~"):
        return None
    others = (
        [list] if setting.takes_list else [int] if setting.takes_number else [bool] if setting.takes_boolean else []
    )
    if not others or (setting.takes_list and not text.lstrip().startswith("[")):
        return text
    try:
        value = read_yaml(text, setting.path)
    except RecipeError:
        return text  # not meant as YAML: a glob such as [ab]*.jsonl
    return value if type(value) in others else text


def _as_chosen(path: str, value: Any) -> Any:
    # YAML reads the word in `console: off` as false.
    setting = owner_of(path)
    if isinstance(value, bool) and setting is not None:
        return next((word for word in (("on", "yes") if value else ("off", "no")) if word in setting.choices), value)
    return value


def _plain(value: Any) -> Any:
    """`value` in the types YAML knows: paths as text, tuples as lists, numpy numbers as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if not isinstance(value, (bool, int, float, str)) and hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    return value


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else shown(value)
