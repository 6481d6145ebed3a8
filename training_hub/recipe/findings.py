"""What a check says of settings: the finding, in the names of whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from training_hub.recipe.yaml_text import write_yaml

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe


@dataclass(frozen=True)
class Names:
    """How the caller wrote each setting. `spelled`: path -> keyword (num_epochs), flag or other YAML key."""

    spelled: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, path: str) -> str:
        """The path, with the caller's own name for it behind: "training.epochs (num_epochs)"."""
        own = self._own(path)
        return f"{path} ({own})" if own and own.lstrip("-") != path else path

    def write(self, path: str, value: Any) -> str:
        """What the caller would write to give `path` this value: num_epochs=1, --epochs 1 or training.epochs: 1."""
        own = self._own(path) or path
        if own.startswith("-"):
            return f"{own} {plainly(value)}"
        return f"{own}={value!r}" if own.isidentifier() and own != path else write_yaml({own: value}).strip()

    def _own(self, path: str) -> str | None:
        inside = (name for key, name in self.spelled.items() if key.startswith(path + "."))
        return self.spelled.get(path) or next(inside, None)


@dataclass(frozen=True)
class Contradiction:
    """A finding and the settings it is about."""

    paths: tuple[str, ...]
    message: str


def value_at(recipe: Recipe, path: str) -> Any:
    """The value of a setting by its path."""
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def is_default(recipe: Recipe, path: str) -> bool:
    section, _, name = path.rpartition(".")
    owner = value_at(recipe, section) if section else recipe
    return bool(getattr(owner, name) == type(owner).model_fields[name].get_default(call_default_factory=True))


def plainly(value: Any) -> str:
    """A value as YAML shows it."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )
