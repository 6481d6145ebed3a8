"""Formats: how a row of data says what it means. A table of (name, recognised by, parsed by).

To add one, write `parse(row, origin, settings) -> Parsed` that raises DataError naming the row, and an entry below.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from training_hub.data.formats.conversations import (
    MESSAGES_READ,
    SHAREGPT_READ,
    holds_messages,
    holds_sharegpt,
    parse_messages,
    parse_sharegpt,
)
from training_hub.data.formats.messages import ROLES
from training_hub.data.formats.plain import (
    INSTRUCTION_READ,
    PAIR_READ,
    TEXT_READ,
    holds_instruction,
    holds_prompt_completion,
    holds_text,
    parse_instruction,
    parse_prompt_completion,
    parse_text,
)
from training_hub.data.formats.settings import MESSAGE_KEYS, ROW_COLUMNS, FormatSettings, Parsed
from training_hub.data.formats.tokens import TOKEN_COLUMNS, holds_tokens, parse_tokens
from training_hub.errors import DataError
from training_hub.types import Origin

__all__ = [
    "FORMATS",
    "ROW_COLUMNS",
    "Format",
    "FormatSettings",
    "Parsed",
    "check_settings",
    "detect",
    "parse",
    "with_our_columns",
]


@dataclass(frozen=True)
class Format:
    """One row format. `columns` is what it reads, to be shown where no format fits; `reads` is all of that."""

    name: str
    columns: str
    reads: tuple[str, ...]
    recognises: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any], Origin, FormatSettings], Parsed]


FORMATS: Mapping[str, Format] = {
    entry.name: entry
    for entry in (
        Format("tokens", "input_ids, labels", TOKEN_COLUMNS, holds_tokens, parse_tokens),
        Format("messages", "messages [{role, content}]", MESSAGES_READ, holds_messages, parse_messages),
        Format("sharegpt", "conversations [{from, value}]", SHAREGPT_READ, holds_sharegpt, parse_sharegpt),
        Format("prompt_completion", "prompt, completion", PAIR_READ, holds_prompt_completion, parse_prompt_completion),
        Format(
            "instruction",
            "instruction, output (or question, answer)",
            INSTRUCTION_READ,
            holds_instruction,
            parse_instruction,
        ),
        Format("text", "text (or document)", TEXT_READ, holds_text, parse_text),
    )
}


def check_settings(format_name: str, settings: FormatSettings) -> list[str]:
    """What is wrong with data.format, data.columns and data.roles, each as one line; [] where nothing is."""
    problems = []
    if format_name != "auto" and format_name not in FORMATS:
        problems.append(f"data.format: {format_name!r} is not known; known: auto, {', '.join(FORMATS)}.")
    known = (*ROW_COLUMNS, *MESSAGE_KEYS)
    for ours in settings.columns:
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(f"data.columns: {ours!r} is none of our columns: {', '.join(dict.fromkeys(known))}.{hint}")
    for theirs, ours in settings.roles.items():
        if ours not in ROLES:
            problems.append(f"data.roles: {theirs!r} is mapped to {ours!r}; our roles: {', '.join(ROLES)}.")
    return problems


def with_our_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with the columns that `columns` (ours -> theirs) names under our names."""
    renames = {theirs: ours for ours, theirs in columns.items() if ours in ROW_COLUMNS and theirs in row}
    return {renames.get(key, key): value for key, value in row.items()} if renames else row


def detect(row: Mapping[str, Any], origin: Origin) -> Format:
    """The format of a row, by its columns. Raises DataError where none fits, or two do that contradict."""
    fitting = [entry for entry in FORMATS.values() if entry.recognises(row)]
    names = [entry.name for entry in fitting]
    # A text column beside a question and answer is common baggage; beside messages it is a choice.
    if {"messages", "sharegpt"} & set(names) and "text" in row:
        raise DataError(f"{origin}: holds both a conversation and text. Say which: data.format: {names[0]}, or text.")
    if fitting:
        return fitting[0]
    columns = "; ".join(f"{entry.name}: {entry.columns}" for entry in FORMATS.values())
    found = ", ".join(map(str, row)) or "none"
    raise DataError(
        f"{origin}: no known format fits its columns ({found}). Formats: {columns}. "
        "Name your columns: data.columns: {messages: YOURS}, or {instruction: YOURS, output: YOURS}."
    )


def parse(row: Mapping[str, Any], origin: Origin, entry: Format, settings: FormatSettings) -> Parsed:
    """The row, read as `entry`, with a note for each column that is not read.

    Raises DataError; where the row looks like another format, it says so.
    """
    renamed = with_our_columns(row, settings.columns)
    try:
        parsed = entry.parse(renamed, origin, settings)
        unread = tuple(f"column {key!r} is not read" for key in renamed if key not in entry.reads)
        return replace(parsed, notes=(*parsed.notes, *unread)) if unread else parsed
    except DataError as error:
        others = [other.name for other in FORMATS.values() if other.recognises(renamed)]
        if others and entry.name not in others:
            hint = f" (read as {entry.name}, but its columns are those of {others[0]}; one source has one format)"
            raise DataError([problem + hint for problem in error.problems]) from error
        raise
