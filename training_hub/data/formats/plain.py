"""Formats of a few text columns: instruction, prompt_completion and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training_hub.data.formats.conversations import READ_COLUMNS, conversation, read_all
from training_hub.data.formats.messages import read_message
from training_hub.data.formats.settings import FormatSettings, Parsed, flag_of, list_of, shown, text_of, weight_of
from training_hub.errors import DataError
from training_hub.types import Message, Origin, Text

# Names for the same three columns; the first is ours.
INSTRUCTION_COLUMNS = ("instruction", "question", "query", "prompt")
INPUT_COLUMNS = ("input", "context")
OUTPUT_COLUMNS = ("output", "response", "answer", "completion", "target")
TEXT_COLUMNS = ("text", "document", "content")
INSTRUCTION_READ = (*INSTRUCTION_COLUMNS, *INPUT_COLUMNS, *OUTPUT_COLUMNS, "system", "history", *READ_COLUMNS)
PAIR_READ = ("prompt", "completion", *READ_COLUMNS)
TEXT_READ = (*TEXT_COLUMNS, "weight")


def _present(row: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in row]


def holds_instruction(row: Mapping[str, Any]) -> bool:
    """Whether the row asks in one column and answers in another; prompt and completion are a format of their own."""
    asks = _present(row, INSTRUCTION_COLUMNS) or _present(row, ("input",))
    return bool(asks and _present(row, OUTPUT_COLUMNS)) and not holds_prompt_completion(row)


def parse_instruction(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    """A row {"instruction", "input" (optional), "output"}, or question and answer: one user turn, one assistant turn.

    `input` (or `context`) follows the instruction after an empty line. `system` is a system message, `history` a
    list of [question, answer] pairs before it.
    """
    asks = _only_one(row, INSTRUCTION_COLUMNS, origin) or _only_one(row, ("input",), origin)
    answers = _only_one(row, OUTPUT_COLUMNS, origin)
    if asks is None or answers is None:
        lacking = "a question" if asks is None else "an answer"
        raise DataError(
            f"{origin}: {lacking} is missing; found columns {', '.join(map(str, row))}. "
            "Name them: data.columns: {instruction: YOURS, output: YOURS}."
        )
    question = text_of(row, asks, origin)
    extra = next((name for name in INPUT_COLUMNS if name != asks and row.get(name)), None)
    if extra:
        question = f"{question}\n\n{text_of(row, extra, origin)}"
    answer = text_of(row, answers, origin)
    if not answer.strip():
        raise DataError(f"{origin}: column {answers!r} is empty; there is nothing to train on.")
    messages = (*_before(row, origin), Message("user", question), Message("assistant", answer))
    return Parsed(conversation(messages, row, origin, settings))


def _only_one(row: Mapping[str, Any], names: tuple[str, ...], origin: Origin) -> str | None:
    found = _present(row, names)
    if len(found) > 1 and names[0] not in found:
        raise DataError(
            f"{origin}: columns {' and '.join(map(repr, found))} could each be the {names[0]}. "
            f"Say which: data.columns: {{{names[0]}: {found[0]}}}."
        )
    return found[0] if found else None


def _before(row: Mapping[str, Any], origin: Origin) -> list[Message]:
    messages = [Message("system", text_of(row, "system", origin))] if row.get("system") else []
    for number, pair in enumerate(list_of(row["history"], "column 'history'", origin) if row.get("history") else [], 1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{origin}: history {number} is {shown(pair)}; a pair [question, answer] is wanted.")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def holds_prompt_completion(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def parse_prompt_completion(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    """A row {"prompt", "completion"}: both text, then no template touches them, or both lists of messages.

    Only the completion is trained; with unmask the prompt too, of a list every role but system.
    """
    if "prompt" not in row or "completion" not in row:
        raise DataError(
            f"{origin}: prompt and completion are wanted; found columns {', '.join(map(str, row))}. "
            "Name them: data.columns: {prompt: YOURS, completion: YOURS}."
        )
    if isinstance(row["prompt"], list | tuple) and isinstance(row["completion"], list | tuple):
        return _message_lists(row, origin, settings)
    prompt, completion = text_of(row, "prompt", origin), text_of(row, "completion", origin)
    if not completion.strip():
        raise DataError(f"{origin}: column 'completion' is empty; there is nothing to train on.")
    weight = weight_of(row, origin)
    of_prompt = weight if settings.unmask or flag_of(row, "unmask", origin) else 0.0
    return Parsed(Text(((prompt, of_prompt), (completion, weight)), origin, settings.end_token, settings.start_token))


def _message_lists(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    unmask = settings.unmask or flag_of(row, "unmask", origin)
    held_out = {} if unmask else {"train": False}
    prompt = [{**turn, **held_out} if isinstance(turn, Mapping) else turn for turn in row["prompt"]]
    notes: list[str] = []
    messages = read_all(
        [*prompt, *row["completion"]], lambda turn, place: read_message(turn, place, settings, notes), origin
    )
    return Parsed(conversation(messages, row, origin, settings), tuple(notes))


def holds_text(row: Mapping[str, Any]) -> bool:
    return bool(_present(row, TEXT_COLUMNS))


def parse_text(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    """A row {"text"} or {"document"}: plain text, trained whole and closed by the end-of-sequence token."""
    column = _only_one(row, TEXT_COLUMNS, origin)
    if column is None:
        raise DataError(
            f"{origin}: no text; found columns {', '.join(map(str, row))}. "
            "Name it: data.columns: {text: YOUR_COLUMN}."
        )
    text = text_of(row, column, origin)
    if not text.strip():
        raise DataError(f"{origin}: column {column!r} is empty; there is nothing to train on.")
    return Parsed(Text(((text, weight_of(row, origin)),), origin, settings.end_token, settings.start_token))
