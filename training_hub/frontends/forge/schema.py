"""Every key of torchforge's YAML, the other spellings of some, and where a name that is none was meant to lead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from training_hub.frontends.forge.key import Key
from training_hub.frontends.forge.keys_of_layouts import LAYOUT
from training_hub.frontends.forge.keys_of_places import PLACE
from training_hub.frontends.forge.keys_of_runs import RUN
from training_hub.recipe.names import nearest, nearest_setting
from training_hub.recipe.translate import shown

KEYS: Mapping[str, Key] = MappingProxyType({**RUN, **LAYOUT, **PLACE})

OF_ACTORS = "actors.trainer."
"""What later versions of torchforge write for `processes.`."""


def key_named(name: str) -> str | None:
    """The key that a name means, None where it means none."""
    name = f"processes.{name.removeprefix(OF_ACTORS)}" if name.startswith(OF_ACTORS) else name
    return name if name in KEYS else None


def is_section(name: str) -> bool:
    """Whether keys stand under this name."""
    return f"{name}.".startswith("actors.") or any(key.startswith(f"{name}.") for key in KEYS)


def unknown(name: str) -> str:
    """The line for a name that is neither a key nor a setting of the recipe."""
    near = nearest(name, KEYS) or nearest_setting(name)
    hint = f" Did you mean {near}?" if near else " `training-hub forge --help` lists them all."
    return f"{name}: not a key.{hint}"


def doc_lines() -> Iterator[str]:
    """Every key with its default and its meaning, for the reference and the help."""
    for name, key in KEYS.items():
        yield f"- `{name}` (`{shown(key.default)}`): {key.doc}" + (f" `{key.setting}`." if key.setting else "")
