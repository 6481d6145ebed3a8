"""Chat templates: the model's own, a named one, or a file, rendered as transformers renders them.

Templates are code from elsewhere: they run in a sandbox with limits on time and text (sandbox.py) and see plain data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.data.budget import Overrun
from training_hub.data.sandbox import compile_template, refusal
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError, HubError

if TYPE_CHECKING:
    import jinja2

NAMED = ("chatml", "zephyr", "llama", "alpaca", "vicuna", "mistral")

# What `strftime_now` shows. A template that prints the date would otherwise give other tokens tomorrow: the cache would
# miss, and a resumed run would not be the interrupted one. template_arguments: {strftime_now: 2026-05-01} sets another.
DAY = "2025-01-01"
LONGEST_MESSAGE = 2000


class TemplateStopped(HubError, ValueError):
    """A template went beyond the limits of a rendering. Not one row's DataError: the next would cost as much again."""

    exit_code = DataError.exit_code


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the tokenizer's special tokens.

    `tool_source` is the variant for conversations with tools, where a model has one ("tool_use").
    """

    name: str
    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    tool_source: str | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, equal to `apply_chat_template(tokenize=False)` of transformers 5.23.

        Keys whose value is None are left out and reasoning is also given as `thinking`, as there; `arguments` win over
        special tokens. Raises DataError with the template's own message, or its line, where it refuses or fails, and
        TemplateStopped where it works or grows beyond the limits.
        """
        source = self.tool_source if tools and self.tool_source is not None else self.source
        arguments = arguments or {}
        variables: dict[str, Any] = {**self.special_tokens, **arguments}
        variables["strftime_now"] = _clock(arguments.get("strftime_now", DAY))
        variables["messages"] = [_message(message) for message in messages]
        variables["tools"] = plain(list(tools)) if tools else None
        variables["add_generation_prompt"] = add_generation_prompt
        return _run(self.name, source, variables)

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides what is rendered, but for the conversation and its arguments."""
        parts = [self.source, self.tool_source, dict(self.special_tokens), DAY]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def resolve_template(name_or_path: str | None, tokenizer: ChatTokenizer) -> ChatTemplate | None:
    """The template called or lying at `name_or_path`; the tokenizer's own for None, and None if it has none.

    Raises DataError for an unknown name, listing the known ones, and for a syntax error, naming its line.
    """
    if name_or_path is None:
        template = _own_template(tokenizer)
    elif name_or_path in NAMED:
        source = (files(__package__) / "templates" / f"{name_or_path}.jinja").read_text(encoding="utf-8")
        template = ChatTemplate(name_or_path, source, tokenizer.special_tokens)
    else:
        template = ChatTemplate(name_or_path, _read(name_or_path), tokenizer.special_tokens)
    if template is not None:
        for source in filter(None, (template.source, template.tool_source)):
            _compiled(template.name, source)
    return template


def no_template(what: str) -> str:
    """The problem of a conversation without a template, and what to write."""
    return (
        f"{what}: the tokenizer has no chat template and none is given. Set data.chat_template to one of "
        f"{', '.join(NAMED)}, or to a Jinja file; the one that the model will be served with."
    )


def _own_template(tokenizer: ChatTokenizer) -> ChatTemplate | None:
    own = tokenizer.chat_template
    if own is None or isinstance(own, str):
        return ChatTemplate("of the tokenizer", own, tokenizer.special_tokens) if own else None
    if "default" not in own:
        raise DataError(
            f"chat template: the tokenizer has several ({', '.join(sorted(own))}) and none is called 'default'. Save "
            "the one you want as a file and name it: data.chat_template."
        )
    return ChatTemplate("of the tokenizer", own["default"], tokenizer.special_tokens, own.get("tool_use"))


def _read(path: str) -> str:
    import difflib

    file = Path(path).expanduser()
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {path}: cannot be read as a text file: {error}.") from error
    near = difflib.get_close_matches(path, NAMED, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DataError(
        f"data.chat_template: {path!r} is neither a known name nor a file; known names: {', '.join(NAMED)}.{hint} "
        "Leave it out for the model's own."
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value if type(value) is str else plain(value) for key, value in message.items() if value is not None}
    reasoning = shown.get("reasoning_content", shown.get("thinking", shown.get("reasoning")))
    if reasoning is not None:
        # gpt-oss reads `thinking`, the others `reasoning_content`.
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    return shown


def plain(value: Any) -> Any:
    """A copy made of JSON types only. Anything else is refused: its methods would be open to the template's code."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise DataError(
        f"a {type(value).__name__} cannot be shown to a chat template; text, numbers, lists and objects can."
    )


def _clock(day: Any) -> Callable[[str], str]:
    try:
        fixed = datetime.combine(day if isinstance(day, date) else date.fromisoformat(day), datetime.min.time())
    except (TypeError, ValueError) as error:
        raise DataError(f"template_arguments.strftime_now: {day!r} is not a day; write it as 2025-12-31.") from error

    def now(form: str) -> str:
        # The C library pads %999999999Y to its width before anybody could charge for it.
        if len(form) > 200 or re.search(r"%[^a-zA-Z%]*\d", form):
            raise DataError(f"strftime_now: {form[:60]!r} is no format for a date.")
        return fixed.strftime(form)

    return now


def _run(name: str, source: str, variables: Mapping[str, Any]) -> str:
    compiled = _compiled(name, source)
    compiled.environment.budget.begin(variables["messages"])  # type: ignore[attr-defined]
    try:
        return compiled.render(variables)
    except Overrun as error:
        raise TemplateStopped(_failure(name, error)) from error
    except (
        Exception
    ) as error:  # a template is foreign code and can raise anything; every failure becomes one of the row
        raise DataError(_failure(name, error)) from error


def _failure(name: str, error: Exception) -> str:
    words = str(error) if len(str(error)) <= LONGEST_MESSAGE else str(error)[:LONGEST_MESSAGE] + "..."
    if isinstance(error, refusal()):
        return f"chat template {name}: refuses this conversation: {words}"
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f", line {line}" if line else ""
    if isinstance(error, Overrun):
        return f"chat template {name}{where}: {words}. Simplify it, or choose another: data.chat_template."
    return f"chat template {name}{where}: {type(error).__name__}: {words}"


def _compiled(name: str, source: str) -> jinja2.Template:
    import jinja2

    try:
        return compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"chat template {name}, line {error.lineno}: syntax error: {error.message}") from error
    except Exception as error:  # what Python's own compiler says to an expression nested a thousand deep
        raise DataError(_failure(name, error)) from error
