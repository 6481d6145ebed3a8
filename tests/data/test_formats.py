"""Rows of every known shape become conversations, texts or tokens; what cannot be is named by row and message."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from training_hub.data.formats import FORMATS, FormatSettings, Parsed, check_settings, detect, parse, with_our_columns
from training_hub.errors import DataError
from training_hub.types import Conversation, Message, Origin, Text, Tokens

ORIGIN = Origin("chat.jsonl", 412)
HELLO = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


def read(row: dict[str, Any], **settings: Any) -> Parsed:
    """The row as its format, found by its columns, reads it."""
    chosen = FormatSettings(**settings)
    return parse(row, ORIGIN, detect(with_our_columns(row, chosen.columns), ORIGIN), chosen)


def talk(row: dict[str, Any], **settings: Any) -> Conversation:
    found = read(row, **settings).row
    assert isinstance(found, Conversation)
    return found


def refused(row: dict[str, Any], **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(row, **settings)
    assert all(line.startswith("chat.jsonl line 412") for line in caught.value.problems)
    return caught.value.problems


def turns(found: Conversation) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in found.messages]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": list(HELLO)}),
        ("messages", {"conversations": list(HELLO), "id": 1}),
        ("messages", {"messages": json.dumps(HELLO)}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ("sharegpt", {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ("instruction", {"instruction": "Hi", "input": "", "output": "Hello"}),
        ("instruction", {"instruction": "Hi", "response": "Hello", "text": "### Hi Hello"}),
        ("instruction", {"question": "Hi", "answer": "Hello"}),
        ("instruction", {"prompt": "Hi", "response": "Hello"}),
        ("instruction", {"input": "Hi", "output": "Hello"}),
        ("prompt_completion", {"prompt": [HELLO[0]], "completion": [HELLO[1]]}),
    ],
)
def test_the_usual_shapes_are_recognised_and_say_the_same(name: str, row: dict[str, Any]) -> None:
    assert detect(row, ORIGIN).name == name
    assert turns(talk(row)) == [("user", "Hi"), ("assistant", "Hello")]


def test_a_row_that_fits_no_format_shows_its_columns_the_formats_and_what_to_write() -> None:
    (problem,) = refused({"utterances": [], "id": 3})
    assert "(utterances, id)" in problem
    assert all(name in problem for name in FORMATS)
    assert "data.columns: {messages: YOURS}" in problem


def test_messages_beside_text_ask_which_one_is_meant() -> None:
    assert "Say which: data.format: messages, or text" in refused({"messages": list(HELLO), "text": "Hi"})[0]


def test_columns_and_message_keys_are_renamed_from_theirs_to_ours() -> None:
    row = {"chat": [{"who": "bot", "said": "Hello"}]}
    found = talk(row, columns={"messages": "chat", "role": "who", "content": "said"}, roles={"bot": "assistant"})
    assert turns(found) == [("assistant", "Hello")]
    assert turns(talk({"q": "Hi", "a": "Hello"}, columns={"instruction": "q", "output": "a"}))[1][1] == "Hello"


def test_an_unknown_role_names_row_message_known_roles_and_the_mapping() -> None:
    (problem,) = refused({"messages": [*HELLO, {"role": "narrator", "content": "x"}]})
    assert "message 3 has role 'narrator'" in problem
    assert "known roles: system, user, assistant, tool" in problem
    assert "data.roles: {narrator:" in problem


def test_usual_aliases_of_roles_are_mapped_with_a_note_and_the_recipe_overrules_them() -> None:
    row = {"messages": [{"role": "Human", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    parsed = read(row)
    assert turns(parsed.row) == [("user", "Hi"), ("assistant", "Hello")]  # type: ignore[arg-type]
    assert parsed.notes == ("role 'Human' is read as user", "role 'bot' is read as assistant")
    assert turns(talk(row, roles={"Human": "assistant", "bot": "tool"})) == [("assistant", "Hi"), ("tool", "Hello")]


def test_all_problems_of_a_row_are_found_each_with_its_message() -> None:
    problems = refused(
        {"messages": [{"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}, "hello", {"role": "bad"}]}
    )
    for number in range(1, 6):
        assert any(f"message {number}" in line for line in problems)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "is empty"),
        ("hello", "a list is wanted"),
        ({"role": "user"}, "a list is wanted"),
        ([HELLO[0]], "nothing to train on"),
        ([{"role": "system", "content": "x"}], "nothing to train on"),
        ([HELLO[0], {"role": "assistant", "content": None}], "content null and no tool_calls"),
        ([HELLO[0], {"role": "assistant"}], "no content"),
        ([HELLO[0], {"role": "assistant", "content": " \n"}], "empty answer"),
        ([HELLO[0], {"role": "assistant", "content": True}], "bool True as content"),
        ([HELLO[0], {"role": None, "content": "x"}], "nothing as role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, HELLO[1]], "'image_url'"),
        ([HELLO[0], {**HELLO[1], "train": "yes"}], "'yes' as train"),
        ([HELLO[0], {**HELLO[1], "train": -1}], "-1 as train"),
        ([HELLO[0], {**HELLO[1], "train": 1, "weight": 0}], "which mean the same"),
        ([HELLO[0], {**HELLO[1], "reasoning_content": 4}], "reasoning_content"),
        ([HELLO[0], {**HELLO[1], "tool_calls": "oops"}, HELLO[1]], "'oops' as tool_calls"),
        ([HELLO[0], {"role": "assistant", "content": None, "tool_calls": [{"arguments": {}}]}], "{name, arguments}"),
        (
            [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{x"}]}],
            "not a JSON object",
        ),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "name": "f", "arguments": {}}]},
                {"role": "tool", "content": "4", "tool_call_id": "b"},
            ],
            "answers tool call 'b'; calls before it: a",
        ),
        ([{"role": "pretraining", "content": "x"}, HELLO[1]], "has to be alone"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_says_why(messages: Any, says: str) -> None:
    assert says in refused({"messages": messages})[0]


def test_content_parts_of_text_are_joined_and_reasoning_and_calls_among_them_found() -> None:
    parts = [
        {"type": "reasoning", "value": "Think."},
        {"type": "text", "text": "One "},
        {"type": "text", "value": "two"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    message = talk({"messages": [HELLO[0], {"role": "assistant", "content": parts}]}).messages[1]
    assert (message.content, message.reasoning_content) == ("One two", "Think.")
    assert message.tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_meaning_under_its_usual_names(key: str) -> None:
    assert talk({"messages": [HELLO[0], {**HELLO[1], key: "Hm."}]}).messages[1].reasoning_content == "Hm."


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": null, "y": [1]}'}},
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [1]}}},
        {"id": "c1", "name": "f", "arguments": {"x": None, "y": [1]}},
    ],
)
def test_tool_calls_come_out_one_way_with_arguments_as_a_dictionary(call: dict[str, Any]) -> None:
    found = talk({"messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    wanted = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [1]}}}
    assert found.messages[1] == Message("assistant", None, tool_calls=(wanted,))


def test_tools_are_a_list_or_its_json_text_and_anything_else_is_a_problem() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        assert talk({"messages": list(HELLO), "tools": given}).tools == tuple(tools)
    assert "not valid JSON" in refused({"messages": list(HELLO), "tools": "[{"})[0]
    assert "tool 1 is str 'f'" in refused({"messages": list(HELLO), "tools": ["f"]})[0]


def test_train_is_a_flag_or_a_weight_under_its_usual_names() -> None:
    for key, given, wanted in (("train", False, 0.0), ("weight", 0, 0.0), ("loss", True, 1.0), ("train", 0.5, 0.5)):
        found = talk({"messages": [HELLO[0], {**HELLO[1], key: given}, HELLO[0], HELLO[1]]})
        assert [message.train for message in found.messages] == [None, wanted, None, None]


def test_a_row_with_only_untrained_turns_is_a_problem_unless_it_is_unmasked() -> None:
    row = {"messages": [HELLO[0], {**HELLO[1], "train": False}]}
    assert "nothing to train on" in refused(row)[0]
    assert talk({**row, "unmask": True}).unmask
    assert talk(row, unmask=True).unmask


def test_row_weight_unmask_and_template_arguments_reach_the_conversation() -> None:
    row = {"messages": list(HELLO), "weight": 0.5, "unmask": True, "chat_template_kwargs": {"a": 2}}
    found = talk(row, template_arguments={"a": 1, "b": 3})
    assert (found.weight, found.unmask, found.template_arguments) == (0.5, True, {"a": 2, "b": 3})
    assert "a number above 0" in refused({"messages": list(HELLO), "weight": 0})[0]
    assert "true or false" in refused({"messages": list(HELLO), "unmask": 1})[0]


def test_keys_of_a_message_that_are_not_read_are_noted() -> None:
    assert read({"messages": [HELLO[0], {**HELLO[1], "mood": "happy"}]}).notes == ("message key 'mood' is not read",)


def test_a_pretraining_row_is_plain_text_trained_whole() -> None:
    found = read({"messages": [{"role": "pretraining", "content": "One."}, {"role": "pretraining", "content": "Two."}]})
    assert found.row == Text((("One.\n\nTwo.", 1.0),), ORIGIN)


def test_sharegpt_reads_system_column_tools_and_function_calls() -> None:
    row = {
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"city": "Paris"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": '[{"name": "f"}]',
    }
    parsed = read(row)
    found = parsed.row
    assert isinstance(found, Conversation)
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2].tool_calls[0]["function"] == {"name": "f", "arguments": {"city": "Paris"}}
    assert found.tools == ({"name": "f"},)
    assert parsed.notes == ()


def test_instruction_takes_input_system_and_history_along() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Maths.", "history": [["Hi", "Hello"]]}
    wanted = [("system", "Maths."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n\n1 2"), ("assistant", "3")]
    assert turns(talk(row)) == wanted


def test_two_columns_that_could_be_the_answer_ask_which_one() -> None:
    (problem,) = refused({"question": "Hi", "answer": "a", "response": "b"})
    assert "'response' and 'answer' could each be the output" in problem
    row = {"question": "Hi", "answer": "a", "response": "b"}
    assert turns(talk(row, columns={"output": "answer"}))[1] == ("assistant", "a")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": " "},
        {"prompt": "Hi", "completion": ""},
        {"text": "\n"},
        {"input_ids": [], "labels": []},
    ],
)
def test_a_row_with_an_empty_answer_has_nothing_to_train_on(row: dict[str, Any]) -> None:
    assert "is empty; there is nothing to train on" in refused(row)[0]


def test_of_prompt_and_completion_only_the_completion_is_trained_unless_unmasked() -> None:
    row = {"prompt": "2 + 2 =", "completion": " 4", "weight": 0.5}
    assert read(row).row == Text((("2 + 2 =", 0.0), (" 4", 0.5)), ORIGIN)
    assert read(row, unmask=True).row == Text((("2 + 2 =", 0.5), (" 4", 0.5)), ORIGIN)


def test_answers_inside_a_prompt_of_messages_are_not_trained() -> None:
    found = talk({"prompt": [*HELLO, HELLO[0]], "completion": [HELLO[1]]})
    assert [message.train for message in found.messages] == [0.0, 0.0, 0.0, None]


def test_text_and_documents_are_trained_whole() -> None:
    for row in ({"text": "Once."}, {"document": "Once.", "id": 3}):
        assert read(row).row == Text((("Once.", 1.0),), ORIGIN)


def tokens(row: dict[str, Any], **settings: Any) -> Tokens:
    found = read(row, **settings).row
    assert isinstance(found, Tokens)
    return found


def test_labels_of_minus_100_are_not_trained_and_weights_multiply() -> None:
    found = tokens({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": [1, 0.5, 2], "weight": 2})
    assert found.ids.dtype == np.int32 and found.weights.dtype == np.float32
    assert found.ids.tolist() == [5, 6, 7] and found.weights.tolist() == [0.0, 1.0, 4.0]


def test_padding_at_the_ends_is_cut_by_the_attention_mask() -> None:
    found = tokens({"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [0, 1, 1, 0]})
    assert found.ids.tolist() == [5, 6]


def test_ids_alone_are_trained_whole_only_when_that_is_said() -> None:
    assert "input_ids without labels" in refused({"input_ids": [1, 2]})[0]
    assert tokens({"input_ids": [1, 2]}, pretraining=True).weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1, 2**31], "labels": [1, 2**31]}, "too large"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "not shifted"),
        ({"input_ids": [1.0, 2], "labels": [1, 2]}, "float 1.0"),
        ({"input_ids": ["1", 2], "labels": [1, 2]}, "str '1'"),
        ({"input_ids": [True, 2], "labels": [1, 2]}, "bool True"),
        ({"input_ids": [10**400, 2], "labels": [1, 2]}, "too large"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}, "attention_mask has 1 entries"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "zeros only at the ends"),
        ({"input_ids": [1, 2], "weights": [1, -1]}, "below 0"),
        ({"input_ids": [1, 2], "weights": ["a", 1]}, "no number"),
    ],
)
def test_token_rows_that_do_not_fit_are_named_with_place_and_value(row: dict[str, Any], says: str) -> None:
    assert says in refused(row)[0]


def test_a_row_of_another_format_than_its_source_says_so() -> None:
    with pytest.raises(DataError, match=r"read as messages, but its columns are those of text"):
        parse({"text": "Once."}, ORIGIN, FORMATS["messages"], FormatSettings())


def test_wrong_settings_are_all_named_with_the_nearest_right_one() -> None:
    problems = check_settings("chatml", FormatSettings(columns={"mesages": "x"}, roles={"bot": "robot"}))
    assert len(problems) == 3
    assert "Did you mean messages?" in problems[1]
