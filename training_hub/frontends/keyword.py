"""One keyword of a function, and the setting or settings of the recipe that it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from training_hub.errors import RecipeError
from training_hub.recipe.names import all_settings, plain_type
from training_hub.recipe.translate import shown

Settings = list[tuple[str, Any]]


@dataclass(frozen=True)
class Keyword:
    """One keyword of a function: the setting it gives, and what turns its value into settings where that is not all.

    path is "" for a keyword that no setting answers to. settings: value -> (path, value) pairs. doc: what it means,
    where the setting's own docstring does not say it.
    """

    name: str
    path: str
    settings: Callable[[Any], Settings] | None = None
    doc: str = ""
    kind: type | None = None

    def type(self) -> type:
        return self.kind or plain_type(all_settings()[self.path])

    def meaning(self) -> str:
        return self.doc or all_settings()[self.path].doc

    def assignments(self, value: Any) -> Settings:
        """The (path, value) pairs that `value` stands for. Raises RecipeError naming the keyword."""
        value = value.value if isinstance(value, Enum) else value
        return self.settings(value) if self.settings else [(self.path, value)]


def flag(name: str, when_true: Settings, when_false: Settings = ()) -> Callable[[Any], Settings]:  # type: ignore[assignment]
    def settings(value: Any) -> Settings:
        if not isinstance(value, bool):
            raise RecipeError(f"{name}: found {shown(value)}; allowed: True or False. Write {name}=False")
        return list(when_true if value else when_false)

    return settings
