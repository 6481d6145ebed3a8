"""One message of a conversation: roles, content, reasoning, tool calls and what of it is trained."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from training_hub.data.formats.settings import FormatSettings, shown
from training_hub.errors import DataError
from training_hub.types import Message

ROLES = ("system", "user", "assistant", "tool", "developer", "pretraining")
# Names that other data sets and trainers use for these roles; each is mapped with a note.
ROLE_ALIASES: Mapping[str, str] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_response": "tool",
}
# Spellings of one key; the first is ours.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TRAIN_KEYS = ("train", "weight", "loss", "loss_weight")
READ_KEYS = {"role", "content", "name", "tool_calls", "function_call", "tool_call_id", *REASONING_KEYS, *TRAIN_KEYS}


def read_message(given: Any, place: str, settings: FormatSettings, notes: list[str]) -> Message:
    """The message that a dictionary describes; `place` begins each problem line ("chat.jsonl line 4: message 2").

    Raises DataError listing all that is wrong with it. Mapped roles and unread keys are appended to `notes`.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"{place} is {shown(given)}; an object with role and content is wanted.")
    if _is_plain(given, settings):
        return Message(role=given["role"], content=given["content"])
    entry = _renamed(given, settings.columns)
    problems: list[str] = []
    role = _role(entry, place, settings, notes, problems)
    content, inner = _content(entry.get("content"), place, problems)
    reasoning = _one_of(entry, REASONING_KEYS, place, problems)
    if reasoning is not None and not isinstance(reasoning, str):
        problems.append(f"{place} has {shown(reasoning)} as reasoning_content; text is wanted.")
    calls = _tool_calls(entry, place, problems) + tuple(inner["calls"])
    train = _train(_one_of(entry, TRAIN_KEYS, place, problems), place, problems)
    if content is None and not calls and not problems:
        seen = "content null" if "content" in entry else f"no content (its keys: {', '.join(map(str, entry))})"
        problems.append(f"{place} has {seen} and no tool_calls. Give it text, or leave the message out.")
    if role == "assistant" and content is not None and not content.strip() and not calls and train != 0:
        problems.append(f"{place} is an empty answer. Give it text, leave the row out, or set train: false in it.")
    if problems:
        raise DataError(problems)
    notes.extend(f"message key {key!r} is not read" for key in entry if key not in READ_KEYS)
    return Message(
        role=role,
        content=content,
        reasoning_content=reasoning or inner["reasoning"] or None,
        tool_calls=calls,
        name=_text_or_none(entry, "name"),
        tool_call_id=_text_or_none(entry, "tool_call_id"),
        train=train,
    )


PLAIN = {"role", "content"}


def _is_plain(given: Mapping[str, Any], settings: FormatSettings) -> bool:
    """Whether it is what nearly all messages are: a known role and a text, in our own words, and nothing else."""
    if given.keys() != PLAIN or settings.columns or settings.roles:
        return False
    content = given["content"]
    return given["role"] in ROLES and isinstance(content, str) and not content.isspace() and content != ""


def _renamed(given: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    theirs = {their: our for our, their in columns.items() if our in READ_KEYS and their in given}
    return {theirs.get(key, key): value for key, value in given.items()}


def _text_or_none(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    return None if value is None else str(value)


def _one_of(entry: Mapping[str, Any], spellings: tuple[str, ...], place: str, problems: list[str]) -> Any:
    set_keys = [key for key in spellings if entry.get(key) is not None]
    if len(set_keys) > 1 and any(entry[key] != entry[set_keys[0]] for key in set_keys):
        problems.append(
            f"{place} has both {' and '.join(map(repr, set_keys))}, which mean the same; keep {spellings[0]}."
        )
    return entry[set_keys[0]] if set_keys else None


def _role(entry: Mapping[str, Any], place: str, settings: FormatSettings, notes: list[str], problems: list[str]) -> str:
    found = entry.get("role")
    if not isinstance(found, str):
        held = f"{shown(found)} as role" if "role" in entry else f"no role (its keys: {', '.join(map(str, entry))})"
        problems.append(f"{place} has {held}; known roles: {', '.join(ROLES)}.")
        return ""
    if found in settings.roles:
        return settings.roles[found]
    if found in ROLES:
        return found
    lower = found.strip().lower()
    meant = lower if lower in ROLES else ROLE_ALIASES.get(lower)
    if meant:
        notes.append(f"role {found!r} is read as {meant}")
        return meant
    near = (difflib.get_close_matches(lower, ROLES, n=1) or ["assistant"])[0]
    problems.append(
        f"{place} has role {found!r}; known roles: {', '.join(ROLES)}. Map it: data.roles: {{{found}: {near}}}."
    )
    return ""


def _content(value: Any, place: str, problems: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The text of a message, and what its parts hold besides: reasoning text and tool calls."""
    inner: dict[str, Any] = {"reasoning": "", "calls": []}
    if value is None or isinstance(value, str):
        return value, inner
    if not isinstance(value, list | tuple):
        problems.append(f"{place} has {shown(value)} as content; text is wanted.")
        return "", inner
    texts = [text for part in value if (text := _part(part, inner, place, problems)) is not None]
    return ("".join(texts) if texts or not inner["calls"] else None), inner


def _part(part: Any, inner: dict[str, Any], place: str, problems: list[str]) -> str | None:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    held = (
        next((part[key] for key in ("text", "value", "thinking", "reasoning") if part.get(key)), "") if kind else None
    )
    if kind == "text" and isinstance(held, str):
        return held
    if kind in ("reasoning", "thinking") and isinstance(held, str):
        inner["reasoning"] += held
        return None
    if kind == "tool_call" and (call := _call(_parsed(held) or part, place, problems)):
        inner["calls"].append(call)
        return None
    problems.append(
        f"{place} has a content part {shown(kind) if kind else shown(part)}; "
        "only parts of type text, reasoning and tool_call can be trained on."
    )
    return None


def _train(value: Any, place: str, problems: list[str]) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    problems.append(f"{place} has {shown(value)} as train; true, false or a number of 0 or more is wanted.")
    return None


def _tool_calls(entry: Mapping[str, Any], place: str, problems: list[str]) -> tuple[dict[str, Any], ...]:
    given = entry.get("tool_calls")
    if isinstance(given, str) and given.strip():
        given = _parsed(given)
    if entry.get("tool_calls") in (None, ""):
        given = []
    if not isinstance(given, list | tuple):
        problems.append(f"{place} has {shown(entry['tool_calls'])} as tool_calls; a list, or its JSON, is wanted.")
        return ()
    old_style = [entry["function_call"]] if entry.get("function_call") else []
    calls = [_call(call, place, problems) for call in (*given, *old_style)]
    return tuple(call for call in calls if call)


def _call(given: Any, place: str, problems: list[str]) -> dict[str, Any] | None:
    """{"type": "function", "function": {"name", "arguments" as dictionary}} and the id, from that or a flat call."""
    call = given if isinstance(given, Mapping) else {}
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        problems.append(
            f"{place} has the tool call {shown(given)}; wanted: {{name, arguments}}, alone or as `function`."
        )
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None and function.get("arguments") is None else arguments
    if not isinstance(arguments, Mapping):
        held = shown(function.get("arguments"))
        problems.append(f"{place}: the arguments of tool call {name!r} are not a JSON object: {held}.")
        return None
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {"id": call["id"], **read} if call.get("id") is not None else read


def _parsed(text: Any) -> Any:
    """What a JSON string holds, None where it is not one."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
