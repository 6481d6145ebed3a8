"""What a format is told, and what it gives back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from training_hub.errors import DataError
from training_hub.recipe.sections import Data
from training_hub.types import Origin, Row

# Names that data.columns may map: of the row, and of the messages in it.
ROW_COLUMNS = (
    "messages", "conversations", "tools", "system", "unmask", "weight", "chat_template_kwargs",
    "instruction", "input", "output", "history", "prompt", "completion", "text",
    "input_ids", "labels", "weights", "attention_mask",
)  # fmt: skip
MESSAGE_KEYS = (
    "role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train", "from", "value",
)  # fmt: skip


@dataclass(frozen=True)
class FormatSettings:
    """The recipe's say in how rows are read.

    columns: ours -> theirs. roles: theirs -> ours. end_token: whether plain text is closed by one.
    start_token: whether it is opened by what the tokenizer puts in front of a text.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    unmask: bool = False
    end_token: bool = True
    start_token: bool = True
    pretraining: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(data: Data) -> FormatSettings:
        """Those of a recipe."""
        return FormatSettings(**{one.name: getattr(data, one.name) for one in fields(FormatSettings)})


@dataclass(frozen=True)
class Parsed:
    """A row that was understood, and facts worth telling once per run ("role 'human' is read as user")."""

    row: Row
    notes: tuple[str, ...] = ()


def text_of(row: Mapping[str, Any], column: str, origin: Origin) -> str:
    """The text in `column`. Raises DataError where it is not text."""
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{origin}: column {column!r} holds {shown(value)}; text is wanted.")
    return value


def list_of(value: Any, what: str, origin: Origin) -> list[Any]:
    """A list, or a JSON string of one (as CSV and some Parquet files hold it). Raises DataError otherwise."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{origin}: {what} is text that is not valid JSON: {error}.") from error
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin}: {what} holds {shown(value)}; a list is wanted.")
    return list(value)


def flag_of(row: Mapping[str, Any], column: str, origin: Origin) -> bool:
    """True or false, false where the column is absent; "true" and "false" as text (CSV) are understood."""
    value = row.get(column)
    if value is None or value == "":
        return False
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise DataError(f"{origin}: column {column!r} holds {shown(value)}; true or false is wanted.")
    return value


def weight_of(row: Mapping[str, Any], origin: Origin) -> float:
    """The row's `weight`, 1 where it is absent; a number as text (CSV) is understood. Raises DataError otherwise."""
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise DataError(f"{origin}: column 'weight' holds {shown(value)}; a number above 0 is wanted.")
    return number


def shown(value: Any) -> str:
    """A value in an error message: its type and beginning."""
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
