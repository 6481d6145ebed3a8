"""Keys on the way to settings of the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from training_hub.frontends.forge.schema import KEYS
from training_hub.recipe.translate import shown


@dataclass
class Reading:
    """What is gathered while keys are read. given: the keys that the user wrote, with their values.

    own: settings of the recipe that the user wrote beside them. num_devices: GPUs of this host, 0 where there is none.
    environment: torchrun's variables in it say how many processes there are.
    """

    given: Mapping[str, Any]
    own: Mapping[str, Any] = field(default_factory=dict)
    num_devices: Callable[[], int] = lambda: 0
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    settings: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def is_given(self, key: str) -> bool:
        return key in self.given

    def value(self, key: str) -> Any:
        """What the user wrote, else the default; also where that is of a wrong kind, which has been told."""
        if key in self.given and KEYS[key].takes(self.given[key]):
            return self.given[key]
        return KEYS[key].default

    def give(self, path: str, value: Any, key: str) -> None:
        """Let a setting have a value that comes from `key`."""
        self.settings[path] = value
        self.spelled[path] = key

    def wrong_kinds(self) -> Iterator[str]:
        """The lines for values of a wrong kind, but for those that the recipe itself will refuse."""
        for key, value in self.given.items():
            if not KEYS[key].setting and not KEYS[key].takes(value):
                wanted, remedy = KEYS[key].allowed, f"Write {key}: {shown(KEYS[key].default)}"
                yield f"{key}: found {shown(value)}; allowed: {wanted}. {remedy}"
