"""Conversations as chat templates read them, and what must be right about them before and after rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from training_hub.types import Conversation, Message


@dataclass(frozen=True, slots=True)
class Form:
    """One of the ways templates want a conversation written down, where they do not agree.

    empty_content: a turn without text has content "" rather than none. text_arguments: the arguments of a tool call are
    JSON text rather than an object. parts: content is a list of parts, as for models that also see pictures.
    """

    empty_content: bool = False
    text_arguments: bool = False
    parts: bool = False


def forms(conversation: Conversation, parts: bool) -> Iterator[Form]:
    """The forms worth trying for this conversation, the usual one first."""
    without_text = any(message.content is None for message in conversation.messages)
    with_calls = any(message.tool_calls for message in conversation.messages)
    for text_arguments in (False, True) if with_calls else (False,):
        for empty_content in (False, True) if without_text else (False,):
            yield Form(empty_content, text_arguments, parts)


def written(message: Message, form: Form) -> dict[str, Any]:
    """What the template reads of `message`."""
    shown = message.as_template_input()
    if shown["content"] is None and form.empty_content:
        shown["content"] = ""
    if form.parts and shown["content"] is not None:
        shown["content"] = [{"type": "text", "text": shown["content"]}]
    if message.tool_calls:
        shown["tool_calls"] = [_call(call, form.text_arguments) for call in message.tool_calls]
    return shown


def replaced(message: Mapping[str, Any], content: str, form: Form, keep_calls: bool = False) -> dict[str, Any]:
    """The same turn saying `content` only: no reasoning, and no tool calls unless they are kept."""
    dropped = {"reasoning_content", "thinking", "reasoning"} | (set() if keep_calls else {"tool_calls"})
    bare = {key: value for key, value in message.items() if key not in dropped}
    bare["content"] = [{"type": "text", "text": content}] if form.parts else content
    return bare


def _call(call: Mapping[str, Any], text_arguments: bool) -> dict[str, Any]:
    """A tool call with its arguments as an object, or as JSON text where the template wants that."""
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _call(function, text_arguments)}
    arguments = call.get("arguments")
    if text_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not text_arguments and isinstance(arguments, str):
        arguments = _parsed(arguments)
    return {**call, "arguments": arguments}


def _parsed(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def called_functions(message: Message) -> list[tuple[str, Any]]:
    """(name, arguments) of each tool call; arguments as an object where they are one."""
    functions = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in message.tool_calls]
    return [(str(f.get("name", "")), _call(f, text_arguments=False)["arguments"]) for f in functions]


def content_problems(conversation: Conversation) -> list[str]:
    """What is wrong before any template is asked: content that is not text, or no whole text."""
    problems = []
    for number, message in enumerate(conversation.messages, start=1):
        where = f"{conversation.origin}: message {number} ({message.role})"
        content: object = message.content
        if content is not None and not isinstance(content, str):
            problems.append(f"{where}: content is a {type(content).__name__}; it must be text.")
            continue
        texts = [message.content, message.reasoning_content, message.name]
        texts += [json.dumps(call, ensure_ascii=False, default=str) for call in message.tool_calls]
        half = next((found for text in texts if text and (found := half_character(text))), None)
        if half:
            problems.append(f"{where}: {half}.")
    return problems


# Egyptian hieroglyphs: letters that neither trimming, changing case nor Python's or JSON's notation changes, and so
# rare that a thousand are free in any text.
_STAND_INS = range(0x13000, 0x1342F)


def masked(
    conversation: Conversation, special: re.Pattern[str] | None, template: str
) -> tuple[Conversation, dict[str, str]]:
    """The conversation with a character of its own for each special token written in it, and what each stands for.

    A special token in a message is one that the template did not write: `<|im_end|>` in a question would end the turn.
    Behind a character that means nothing to template and tokenizer it is text like any other, and can be found again.
    """
    spoken = [text for m in conversation.messages for text in (m.content, m.reasoning_content, m.name) if text]
    spoken += _strings([m.tool_calls for m in conversation.messages if m.tool_calls])
    everything = "\n".join([*spoken, *_strings(conversation.tools)])
    if special is None or not special.search(everything):
        return conversation, {}
    found = sorted(set(special.findall(everything)))
    taken = set(template + everything)
    free = (chr(code) for code in _STAND_INS if chr(code) not in taken)
    stand_ins = dict(zip(free, found, strict=False))
    names = {token: character for character, token in stand_ins.items()}

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(lambda match: names[match.group()], value)
        if isinstance(value, Mapping):
            return {hide(key): hide(item) for key, item in value.items()}
        return type(value)(map(hide, value)) if isinstance(value, list | tuple) else value

    messages = tuple(
        replace(
            message,
            content=hide(message.content),
            reasoning_content=hide(message.reasoning_content),
            name=hide(message.name),
            tool_calls=hide(message.tool_calls),
        )
        for message in conversation.messages
    )
    return replace(conversation, messages=messages, tools=hide(conversation.tools)), stand_ins


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value, names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def unmasked(text: str, stand_ins: Mapping[str, str]) -> tuple[str, list[tuple[int, int]], Callable[[int], int]]:
    """The text with the special tokens again, their places in it, and where a place of `text` lies in it."""
    found = [(at, stand_ins[character]) for at, character in enumerate(text) if character in stand_ins]
    parts, places, before, longer = [], [], 0, 0
    for at, token in found:
        parts += [text[before:at], token]
        places.append((at + longer, at + longer + len(token)))
        longer += len(token) - 1
        before = at + 1

    def moved(position: int) -> int:
        return position + sum(len(token) - 1 for at, token in found if at < position)

    return "".join([*parts, text[before:]]), places, moved


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds half of a surrogate pair, which no tokenizer can read; None if it is whole.

    JSON cut in the middle of an escape such as \\ud83d leaves one.
    """
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair ({text[error.start]!r}), which is no text"
    return None


def alternatives(strings: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of `strings`, the longest first; None for none."""
    if not strings:
        return None
    return re.compile("|".join(re.escape(s) for s in sorted(strings, key=lambda s: (-len(s), s))))


def shows(text: str, content: str) -> bool:
    """Whether `text` holds `content`, but for white space around it or being written as JSON."""
    core = content.strip()
    if core in text:
        return True
    if any(json.dumps(core, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True)):
        return True
    return "".join(core.split()) in "".join(text.split())


def missing_of_call(name: str, arguments: Any, text: str) -> str | None:
    """The name or argument of a tool call that `text` does not show; None if all is there."""
    if name not in text:
        return f"the function name {name!r}"
    for leaf in _leaves(arguments):
        if not shows(text, leaf):
            return f"the argument {leaf!r} of {name}"
    return None


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def python_repr(message: Message, text: str) -> str | None:
    """Python's way of writing an object or None, where `text` shows it in place of JSON or of nothing."""
    for _, arguments in called_functions(message):
        if isinstance(arguments, dict) and arguments:
            written_by_python = repr(arguments)
            if written_by_python in text and written_by_python != json.dumps(arguments, ensure_ascii=False):
                return written_by_python
    if message.content is None:
        own = json.dumps(list(message.tool_calls), ensure_ascii=False) + (message.reasoning_content or "")
        if re.search(r"\bNone\b", text) and "None" not in own:
            return "None"
    return None
