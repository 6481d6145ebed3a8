"""Bad inputs 31 to 52: rows whose columns and messages are not what any format says."""

from __future__ import annotations

import json

import pytest

from tests.bad_inputs.desk import GOOD, Case, Desk, chat, refuses, trains
from tests.data.tiny import THINKING, TOOLS

ASK, ANSWER = ("user", "Is it warm in Paris?"), ("assistant", "Yes, very.")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def call(arguments: object = None, **more: object) -> dict[str, object]:
    function = {"name": "weather", "arguments": {"city": "Paris"} if arguments is None else arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "id": "a1", "function": function}],
        **more,
    }


def answered(tool_call_id: str) -> dict[str, object]:
    reply = {"role": "tool", "tool_call_id": tool_call_id, "content": "24 degrees"}
    return chat(ASK, call(), reply, ANSWER)


CASES: tuple[Case, ...] = (
    refuses(
        31,
        "unknown columns",
        [{"frage": "a", "antwort": "b"}],
        "line 1: no known format",
        "(frage, antwort)",
        "data.columns",
    ),
    trains(
        32,
        "sharegpt",
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "sharegpt rows",
    ),
    trains(33, "alpaca", [{"instruction": "Add", "input": "1, 2", "output": "3"}], "instruction rows"),
    refuses(
        34,
        "two kinds of rows",
        [GOOD, {"instruction": "a", "output": "b"}],
        "line 2: no conversation",
        "(read as messages, but its columns are those of instruction; one source has one format)",
    ),
    trains(
        35,
        "more columns",
        [{**GOOD, "id": 7, "source": "web"}],
        "column 'id' is not read",
        "column 'source' is not read",
    ),
    refuses(
        36, "messages is text", [{"messages": "Hello"}], "line 1: column 'messages' holds str 'Hello'; a list is wanted"
    ),
    refuses(
        36, "messages is an object", [GOOD, {"messages": {"role": "user"}}], "line 2: column 'messages' holds dict"
    ),
    refuses(37, "no messages", [GOOD, {"messages": []}], "line 2: column 'messages' is empty"),
    refuses(38, "no role", [chat(ASK, {"content": "Yes."})], "line 1: message 2 has no role (its keys: content)"),
    refuses(39, "no content", [chat(ASK, {"role": "assistant"})], "line 1: message 2 has no content (its keys: role)"),
    refuses(
        40,
        "unknown role",
        [chat(("usr", "a"), ANSWER)],
        "message 1 has role 'usr'",
        "known roles: system",
        "{usr: user}",
    ),
    trains(
        41,
        "names of roles",
        [chat(("Human", "a"), ("BOT", "b"))],
        "role 'Human' is read as user",
        "role 'BOT' is read as assistant",
    ),
    refuses(
        42,
        "content is a number or true",
        [chat(ASK, ("assistant", value)) for value in (7, 0.5, True)],
        "line 1: message 2 has int 7 as content",
        "line 2: message 2 has float 0.5 as content",
        "line 3: message 2 has bool True as content",
    ),
    trains(
        43, "content of text parts", [chat(ASK, ("assistant", [{"type": "text", "text": "Yes."}]))], "messages rows"
    ),
    refuses(
        43,
        "content of unknown parts",
        [chat(ASK, ("assistant", [{"type": "poem"}]))],
        "message 2 has a content part str 'poem'",
    ),
    refuses(
        44,
        "pictures and sound",
        [
            chat(("user", [{"type": kind}, {"type": "text", "text": "What?"}]), ANSWER)
            for kind in ("image", "input_audio")
        ],
        "line 1: message 1 has a content part str 'image'",
        "line 2: message 1 has a content part str 'input_audio'",
    ),
    refuses(
        46,
        "content null without calls",
        [chat(ASK, ("assistant", None))],
        "message 2 has content null and no tool_calls",
    ),
    refuses(
        48,
        "arguments are not JSON",
        [chat(ASK, call("{city: Paris"))],
        "message 2: the arguments of tool call 'weather' are not",
    ),
    refuses(49, "answer to no call", [answered("zz")], "line 1: message 3 answers tool call 'zz'; calls before it: a1"),
    refuses(
        50, "tools are not JSON", [{**GOOD, "tools": "[{name"}], "line 1: column 'tools' is text that is not valid JSON"
    ),
    refuses(
        52,
        "text beside messages",
        [{**GOOD, "text": "all of it"}],
        "line 1: holds both a conversation and text",
        "data.format",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_schema(case: Case, desk: Desk) -> None:
    case.hold(desk)


def test_45_content_may_be_null_beside_tool_calls(desk: Desk) -> None:
    template = desk.file(TOOLS, "tools.jinja")
    desk.train([answered("a1")], "--data.chat_template", str(template)).trained("messages rows")


def test_47_arguments_of_calls_are_one_thing_as_text_and_as_an_object(desk: Desk) -> None:
    template = str(desk.file(TOOLS, "tools.jinja"))
    rows = [chat(ASK, call('{"city": "Paris"}')), chat(ASK, call({"city": "Paris"}))]
    desk.train(rows, "--data.chat_template", template).trained("1 rows (50.0%) are exact duplicates")


def test_50_tools_may_be_JSON_text(desk: Desk) -> None:
    template = str(desk.file(TOOLS, "tools.jinja"))
    desk.train([chat(ASK, call(), tools=json.dumps([TOOL]))], "--data.chat_template", template).trained("messages rows")


def test_51_reasoning_that_the_template_drops_is_counted(desk: Desk) -> None:
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "It is July."}
    desk.train([chat(ASK, answer), GOOD]).trained("template drops reasoning_content: 1 rows")


def test_51_reasoning_of_earlier_turns_is_counted(desk: Desk) -> None:
    template = str(desk.file(THINKING, "thinking.jinja"))
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "It is July."}
    rows = [chat(ASK, answer, ASK, answer)]
    desk.train(rows, "--data.chat_template", template).trained("reasoning of earlier turns not shown: 1 rows")
