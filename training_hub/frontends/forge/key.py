"""What is known of one key of torchforge's YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training_hub.recipe.names import all_settings

Kinds = tuple[type, ...]

NUMBER: Kinds = (float, int)
COUNT: Kinds = (int,)
TEXT: Kinds = (str,)
FLAG: Kinds = (bool,)
LIST: Kinds = (list,)
COUNT_OR_TEXT: Kinds = (int, str)

WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Key:
    """One key: its default in torchtitan 0.2 `JobConfig` unless `doc` says otherwise, and the kinds of its values.

    path: the setting of the recipe that takes the value as it is. only: the values it may have, where there is no such
    setting; reason: why it may have no other. follows: the setting that takes the value as soon as the recipe has it.
    What has none of these is read by a function of `meaning`.
    """

    default: Any
    doc: str
    kinds: Kinds
    path: str = ""
    only: tuple[Any, ...] = ()
    reason: str = ""
    follows: str = ""

    @property
    def setting(self) -> str:
        """The path of the recipe that takes the value as it is; "" where there is none."""
        return self.path or (self.follows if self.follows in all_settings() else "")

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        kinds = [WORDS[kind] for kind in self.kinds if not (kind is int and float in self.kinds)]
        return " or ".join([*kinds, *(["null"] if self.default is None else [])])

    def takes(self, value: Any) -> bool:
        """Whether a value is of the right kind; a boolean is no number."""
        if value is None:
            return self.default is None
        return isinstance(value, self.kinds) and (not isinstance(value, bool) or bool in self.kinds)
