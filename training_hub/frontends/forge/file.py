"""What a user wrote, key by key: a preset or a YAML file, its `${...}` references, and `a.b=c` behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.forge.schema import KEYS, is_section, key_named, unknown
from training_hub.recipe.load import Layer, collect, layer_of, merge, read_text, read_value
from training_hub.recipe.names import nearest, resolve, sections
from training_hub.recipe.translate import shown
from training_hub.recipe.yaml_text import read_yaml

PACKAGE = Path(__file__).parents[2]
PRESETS = PACKAGE / "apps" / "sft"
HUB = "hf://"
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
BUILT_IN = {"demo_model": str(PACKAGE / "demo" / "model")}
"""What `${...}` may name besides keys of the file: the small model that comes with this package."""


@dataclass(frozen=True)
class Wishes:
    """keys: torchforge's, by name, as given. own: settings of the recipe given beside them. problems: what is wrong."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    own: Layer = field(default_factory=Layer)
    problems: tuple[str, ...] = ()


def presets() -> list[str]:
    """The names of the configurations that come with this package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def config_file(named: str) -> Path:
    """The file that `--config` names: a path, or a preset by its name or by its path in this package.

    Raises RecipeError listing the presets.
    """
    path = Path(named).expanduser()
    if path.exists():
        return path
    is_preset = path.stem in presets() and (path.parent == Path() or path.parent.parts[-2:] == ("apps", "sft"))
    if is_preset and path.suffix in ("", ".yaml"):
        return PRESETS / f"{path.stem}.yaml"
    near = nearest(path.stem, presets())
    hint = f" Did you mean --config {near}?" if near else ""
    raise RecipeError(f"--config: there is no file {named}, and no preset of this name: {', '.join(presets())}.{hint}")


def read_config(named: str) -> dict[str, Any]:
    """The mapping in a configuration file or preset. Raises RecipeError."""
    path = config_file(named)
    tree = read_yaml(read_text(path), str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{named}: found {shown(tree)}; a mapping such as `model: {{name: llama3}}` is wanted.")
    return tree


def wishes(config: Mapping[str, Any], assigned: Iterable[str] = ()) -> Wishes:
    """What a nested configuration and `a.b=c` texts (with or without --) ask for; the texts win.

    Problems are gathered, not raised: they are told with all that is wrong in the recipe.
    """
    problems: list[str] = []
    pairs = [*_leaves(config, "")]
    known = dict(pairs)
    variables = {name for name in known if "." not in name and f"${{{name}}}" in repr(config)}
    filled = [(name, _filled(value, known, name, problems)) for name, value in pairs if name not in variables]
    keys, own = _sorted_out(filled, problems)
    typed, typed_own = _sorted_out(_assignments(assigned, problems), problems, again=True)
    return Wishes({**keys, **typed}, merge(own, typed_own), tuple(problems))


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) pairs; sections of torchforge's and of the recipe's are opened."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        opens = is_section(name) or name in sections()
        if opens and isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        elif not (opens and value is None):  # `training:` with nothing under it
            yield name, value


def _filled(value: Any, known: Mapping[str, Any], name: str, problems: list[str]) -> Any:
    """The value with `${a.b}` replaced by what the file says there, and hf://NAME by NAME."""
    if isinstance(value, list):
        return [_filled(one, known, name, problems) for one in value]
    if isinstance(value, Mapping):
        return {key: _filled(one, known, name, problems) for key, one in value.items()}
    if not isinstance(value, str):
        return value

    def named(match: re.Match[str]) -> str:
        found = known.get(match[1], BUILT_IN.get(match[1]))
        if found is None:
            near = nearest(match[1], [*known, *BUILT_IN])
            problems.append(
                f"{name}: {match[0]} names nothing in this file." + (f" Did you mean {near}?" if near else "")
            )
        return str(found)

    return REFERENCE.sub(named, value).removeprefix(HUB)


def _assignments(texts: Iterable[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The pairs of `a.b=c` texts. A value goes to the end of its text, so it may hold another =."""
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--")
        if not equals:
            problems.append(f"{text}: not understood; a key is written --{name or 'training.steps'}=VALUE.")
            continue
        key = key_named(name)
        try:
            found: Any = read_value(name, value) if key is None else _read(key, value)
        except RecipeError as error:
            problems += error.problems
            continue
        yield name, _filled(found, {}, name, problems)


def _read(key: str, text: str) -> Any:
    return text if KEYS[key].kinds == (str,) and text not in ("null", "~") else read_yaml(text, key)


def _sorted_out(
    pairs: Iterable[tuple[str, Any]], problems: list[str], *, again: bool = False
) -> tuple[dict[str, Any], Layer]:
    """torchforge's keys, and the recipe's own settings; again: of several for one the last counts."""
    keys: dict[str, Any] = {}
    own: list[tuple[str, Any]] = []
    for name, value in pairs:
        key = key_named(name)
        if key is None and (name in sections() or is_section(name)):
            problems.append(f"{name}: found {shown(value)}; it is a section. Write its keys under it.")
        elif key is None and resolve(name) is None:
            problems.append(unknown(name))
        elif key is None:
            own.append((name, value))
        elif key in keys and not again:
            problems.append(f"{key}: given twice. Keep one.")
        else:
            keys[key] = value
    layer = collect(own, again=again) if own else layer_of(None)
    return keys, layer
