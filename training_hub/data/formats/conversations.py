"""Formats that hold whole conversations: messages (role, content) and sharegpt (from, value)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from training_hub.data.formats.messages import read_message
from training_hub.data.formats.settings import FormatSettings, Parsed, flag_of, list_of, shown, weight_of
from training_hub.errors import DataError
from training_hub.types import Conversation, Message, Origin, Row, Text

READ_COLUMNS = ("tools", "unmask", "weight", "chat_template_kwargs")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
MESSAGES_READ = (*CONVERSATION_COLUMNS, *READ_COLUMNS)
SHAREGPT_READ = (*MESSAGES_READ, "system")

# What ShareGPT data sets write in `from`, beyond what any message may say.
SPEAKERS = {"chatbot": "assistant", "bing": "assistant", "bard": "assistant", "tool_call": "assistant"}


def holds_messages(row: Mapping[str, Any]) -> bool:
    """Whether the row has a list of {role, content}, under any of the usual names."""
    return _first_turn_has(row, "role") or ("messages" in row and not holds_sharegpt(row))


def holds_sharegpt(row: Mapping[str, Any]) -> bool:
    """Whether the row has a list of {from, value}."""
    return _first_turn_has(row, "from")


def _first_turn_has(row: Mapping[str, Any], key: str) -> bool:
    for column in CONVERSATION_COLUMNS:
        turns = row.get(column)
        if isinstance(turns, str):
            # A CSV or Parquet file may hold the list as JSON text; its first characters are enough to tell.
            if f'"{key}"' in turns[:200]:
                return True
        elif isinstance(turns, list | tuple) and turns and isinstance(turns[0], Mapping) and key in turns[0]:
            return True
    return False


def parse_messages(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    """A row {"messages": [{"role": ..., "content": ...}, ...]}, with optional tools, unmask and weight.

    A row of `pretraining` messages is plain text: their contents, joined by an empty line, are trained whole, closed
    by the end-of-sequence token, and no template touches them. The role cannot stand beside others.
    """
    notes: list[str] = []
    given = _turns(row, origin)
    messages = read_all(given, lambda turn, place: read_message(turn, place, settings, notes), origin)
    return Parsed(conversation(messages, row, origin, settings), tuple(notes))


def parse_sharegpt(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    """A row {"conversations": [{"from": "human", "value": ...}, ...]}, with an optional `system` column.

    A turn from function_call holds its calls as JSON, {"name": ..., "arguments": ...} or a list of these.
    """
    notes: list[str] = []
    messages = read_all(_turns(row, origin), lambda turn, place: _sharegpt_turn(turn, place, settings, notes), origin)
    if isinstance(row.get("system"), str) and row["system"]:
        messages = (Message("system", row["system"]), *messages)
    return Parsed(conversation(messages, row, origin, settings), tuple(notes))


def _sharegpt_turn(turn: Any, place: str, settings: FormatSettings, notes: list[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{place} is {shown(turn)}; an object with from and value is wanted.")
    renamed = dict(turn)
    for ours, sharegpt in (("role", "from"), ("content", "value")):
        name = settings.columns.get(sharegpt, sharegpt)
        if name in renamed:
            renamed[ours] = renamed.pop(name)
    speaker = str(renamed.get("role"))
    if speaker in settings.roles:
        renamed["role"] = settings.roles[speaker]
    elif speaker in SPEAKERS:
        renamed["role"] = SPEAKERS[speaker]
    if speaker in ("function_call", "tool_call"):
        calls = renamed.pop("content", None)
        renamed |= {"content": None, "tool_calls": calls if str(calls).lstrip().startswith("[") else f"[{calls}]"}
    read: list[str] = []
    message = read_message(renamed, place, settings, read)
    # human and gpt are this format's own words, nothing to remark on.
    notes.extend(note for note in read if not note.startswith("role "))
    return message


def _turns(row: Mapping[str, Any], origin: Origin) -> list[Any]:
    column = next((name for name in CONVERSATION_COLUMNS if name in row), None)
    if column is None:
        raise DataError(
            f"{origin}: no conversation; found columns {', '.join(map(str, row)) or 'none'}. "
            "Name it: data.columns: {messages: YOUR_COLUMN}."
        )
    turns = list_of(row[column], f"column {column!r}", origin)
    if not turns:
        raise DataError(f"{origin}: column {column!r} is empty; there is nothing to train on.")
    return turns


def read_all(given: list[Any], read: Callable[[Any, str], Message], origin: Origin) -> tuple[Message, ...]:
    """All messages, or a DataError with the problems of every one; messages are counted from 1."""
    messages: list[Message] = []
    problems: list[str] = []
    for number, turn in enumerate(given, start=1):
        try:
            messages.append(read(turn, f"{origin}: message {number}"))
        except DataError as error:
            problems.extend(error.problems)
    problems.extend(_unanswered_calls(messages, origin) if not problems else [])
    if problems:
        raise DataError(problems)
    return tuple(messages)


def _unanswered_calls(messages: list[Message], origin: Origin) -> list[str]:
    """Tool messages that answer a call nobody made. Data without ids is not judged."""
    known: set[str] = set()
    problems = []
    for number, message in enumerate(messages, start=1):
        known |= {str(call["id"]) for call in message.tool_calls if "id" in call}
        if message.role == "tool" and message.tool_call_id and known and message.tool_call_id not in known:
            problems.append(
                f"{origin}: message {number} answers tool call {message.tool_call_id!r}; "
                f"calls before it: {', '.join(sorted(known))}."
            )
    return problems


def conversation(
    messages: tuple[Message, ...], row: Mapping[str, Any], origin: Origin, settings: FormatSettings
) -> Row:
    """The Conversation of these messages and the row's tools, unmask and weight, or the Text of a pretraining row.

    Raises DataError where nothing in it would be trained.
    """
    unmask = settings.unmask or flag_of(row, "unmask", origin)
    weight = weight_of(row, origin)
    if any(message.role == "pretraining" for message in messages):
        return _pretraining(messages, weight, origin)
    if settings.pretraining:
        raise DataError(
            f"{origin}: a conversation, but data.pretraining joins plain text; give text rows or turn it off."
        )
    if not any(_is_trained(message, unmask) for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"{origin}: nothing to train on: no assistant turn among {roles}. Set unmask to train other roles."
        )
    arguments = row.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"{origin}: column 'chat_template_kwargs' holds {shown(arguments)}; an object is wanted.")
    return Conversation(
        messages, origin, _tools(row, origin), unmask, weight, {**settings.template_arguments, **arguments}
    )


def _is_trained(message: Message, unmask: bool) -> bool:
    if message.train is not None:
        return message.train > 0
    return message.role == "assistant" or (unmask and message.role != "system")


def _pretraining(messages: tuple[Message, ...], weight: float, origin: Origin) -> Text:
    others = sorted({message.role for message in messages if message.role != "pretraining"})
    if others:
        raise DataError(f"{origin}: role pretraining stands beside {', '.join(others)}; it has to be alone in its row.")
    return Text((("\n\n".join(message.content or "" for message in messages), weight),), origin)


def _tools(row: Mapping[str, Any], origin: Origin) -> tuple[dict[str, Any], ...]:
    given = row.get("tools")
    if given is None or given == "":
        return ()
    tools = list_of(given, "column 'tools'", origin)
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, Mapping):
            raise DataError(
                f"{origin}: tool {number} is {shown(tool)}; an object (JSON schema of a function) is wanted."
            )
    return tuple(dict(tool) for tool in tools)
