"""Exactly the characters that a model produces when it serves are trained, for any template, from its own rendering."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.data.tiny import (
    CHATML,
    DEEPSEEK,
    GLM,
    LLAMA2,
    THINKING,
    TOOLS,
    chat_tokenizer,
    talk,
    template,
)
from training_hub.data import findings
from training_hub.data.masks import Marks, Masker
from training_hub.types import Conversation, Message

GLM_TOKENS = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
DEEPSEEK_TOKENS = ["<s>", "<|User|>", "<|Assistant|>", "<|eos|>"]
HELLO = (("user", "Hello"), ("assistant", "I am fine"), ("user", "And?"), ("assistant", "Four"))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
SETTINGS: dict[str, dict[str, Any]] = {
    CHATML: {},
    TOOLS: {},
    THINKING: {},
    LLAMA2: {"special": ["<s>", "</s>"], "eos": "</s>"},
    GLM: {"special": GLM_TOKENS, "eos": "<|user|>"},
    DEEPSEEK: {"special": DEEPSEEK_TOKENS, "eos": "<|eos|>"},
}


def mark(
    source: str, row: Conversation, *, turns: str = "all", unmask: bool = False, quick: bool = True, **tokens
) -> Marks:
    tokenizer = chat_tokenizer(**(tokens or SETTINGS.get(source, {})))
    masker = Masker(template(source, tokenizer), tokenizer, unmask=unmask, turns=turns, quick=quick)
    return masker.mark(row)


def trained(marks: Marks) -> list[str]:
    """The trained stretches of text, of all texts of the row."""
    assert marks.problems == ()
    return [text[span.start : span.end] for text, spans in marks.texts for span in spans]


def test_answers_and_the_token_that_ends_them_are_trained():
    marks = mark(CHATML, talk(("system", "Be brief"), *HELLO))
    assert trained(marks) == ["I am fine<|im_end|>", "Four<|im_end|>"]
    assert marks.notes == ()


def test_text_is_the_unmodified_rendering():
    row = talk(("user", " Hello\n"), ("assistant", "\n I am fine \n"))
    text = mark(CHATML, row).texts[0][0]
    assert text == template(CHATML).render([m.as_template_input() for m in row.messages], (), False, {})


def test_white_space_of_the_answer_is_trained_as_the_template_shows_it():
    assert trained(mark(CHATML, talk(("user", "x"), ("assistant", "\n\n I am\n")))) == ["\n\n I am\n<|im_end|>"]


def test_template_that_trims_and_has_no_generation_prompt():
    row = talk(("user", " Hello "), ("assistant", "  I am fine\n"), ("user", "And?"), ("assistant", "Four"))
    marks = mark(LLAMA2, row)
    assert trained(marks) == [" I am fine </s>", " Four </s>"]
    assert marks.notes == ()


def test_header_of_the_next_turn_is_trained_where_it_is_what_stops_the_model():
    marks = mark(GLM, talk(*HELLO))
    assert trained(marks) == ["I am fine<|user|>", "Four"]
    assert marks.notes == (findings.NO_STOP,)


def test_header_of_the_next_turn_is_not_trained_where_the_model_does_not_stop_at_it():
    marks = mark(GLM, talk(*HELLO), special=GLM_TOKENS, eos="<|endoftext|>")
    assert trained(marks) == ["I am fine", "Four"]
    assert marks.notes == (findings.NO_STOP,)


def test_closing_token_is_trained_and_told_where_the_model_does_not_stop_at_it():
    marks = mark(CHATML, talk(*HELLO), eos="<|endoftext|>")
    assert trained(marks) == ["I am fine<|im_end|>", "Four<|im_end|>"]
    assert marks.notes == (findings.NO_STOP_ID,)


def test_closing_words_that_are_no_token_are_trained_and_told():
    marks = mark(CHATML, talk(*HELLO), special=["<|endoftext|>"], eos="<|endoftext|>")
    assert trained(marks) == ["I am fine<|im_end|>", "Four<|im_end|>"]
    assert marks.notes == (findings.NO_STOP_ID,)


def test_closing_runs_on_to_the_token_the_model_stops_at():
    source = CHATML.replace("<|im_end|>\n", "{% if m.role == 'assistant' %}</a>{% endif %}<|im_end|><|endoftext|>\n")
    marks = mark(source, talk(*HELLO), eos="<|endoftext|>")
    assert trained(marks)[0] == "I am fine</a><|im_end|><|endoftext|>"
    assert marks.notes == ()


def test_reasoning_is_trained_where_shown_and_dropped_reasoning_is_told():
    row = talk(
        ("user", "Hello"),
        Message("assistant", "One", reasoning_content="first thoughts"),
        ("user", "And?"),
        Message("assistant", "Two", reasoning_content="second thoughts"),
    )
    marks = mark(THINKING, row)
    assert trained(marks) == ["One<|im_end|>", "<think>\nsecond thoughts\n</think>\n\nTwo<|im_end|>"]
    assert marks.notes == (findings.REASONING_EARLIER, findings.UNSTEADY)
    dropped = mark(CHATML, row)
    assert trained(dropped) == ["One<|im_end|>", "Two<|im_end|>"]
    assert dropped.notes == (findings.REASONING_DROPPED,)


def test_empty_thoughts_that_a_template_adds_to_the_last_turn_are_trained_and_the_difference_told():
    marks = mark(THINKING, talk(*HELLO))
    assert trained(marks) == ["I am fine<|im_end|>", "<think>\n\n</think>\n\nFour<|im_end|>"]
    assert marks.notes == (findings.UNSTEADY,)
    assert mark(THINKING, talk(*HELLO[:2])).notes == ()


def test_thoughts_opened_by_the_generation_prompt_are_not_trained():
    source = THINKING.replace(
        "'<|im_start|>assistant\n' -}}{%- endif", "'<|im_start|>assistant\n<think>\n' -}}{%- endif"
    )
    row = talk(("user", "Hello"), Message("assistant", "One", reasoning_content="thoughts"))
    assert trained(mark(source, row)) == ["thoughts\n</think>\n\nOne<|im_end|>"]


def test_generation_prompt_that_answers_do_not_repeat_is_told():
    marks = mark(DEEPSEEK, talk(*HELLO))
    assert trained(marks) == ["I am fine<|eos|>", "Four<|eos|>"]
    assert marks.notes == (findings.PROMPT_DIFFERS,)


def test_unroll_trains_each_turn_as_serving_shows_it():
    row = talk(
        ("user", "Hello"),
        Message("assistant", "One", reasoning_content="first"),
        ("user", "And?"),
        Message("assistant", "Two", reasoning_content="second"),
    )
    marks = mark(THINKING, row, turns="unroll")
    assert trained(marks) == [
        "<think>\nfirst\n</think>\n\nOne<|im_end|>",
        "<think>\nsecond\n</think>\n\nTwo<|im_end|>",
    ]
    assert marks.notes == ()
    messages = [m.as_template_input() for m in row.messages]
    for (text, (span,)), count in zip(marks.texts, (1, 3), strict=True):
        prompt = template(THINKING).render(messages[:count], (), True, {})
        assert text == template(THINKING).render(messages[: count + 1], (), False, {})
        assert text[: span.start] == prompt


def test_last_trains_only_the_last_answer():
    marks = mark(CHATML, talk(*HELLO), turns="last")
    assert trained(marks) == ["Four<|im_end|>"]
    assert marks.texts[0][0].count("<|im_end|>") == 4


def test_tool_calls_without_text_are_trained():
    row = talk(
        ("user", "Weather?"),
        Message("assistant", None, tool_calls=(CALL,)),
        Message("tool", "sunny", name="weather"),
        ("assistant", "It is sunny"),
    )
    marks = mark(TOOLS, row)
    assert trained(marks) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>',
        "It is sunny<|im_end|>",
    ]
    assert marks.notes == ()


def test_tool_answers_shown_inside_the_turn_that_called_are_not_trained():
    # Gemma 4: the tool's answer, and text that came with the call, follow the call in the same turn.
    source = (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>' -}}"
        "{%- elif m.role == 'assistant' -%}{{- '<|im_start|>model\n' -}}"
        "{%- for call in m.tool_calls or [] -%}{{- call.function.name + (call.function.arguments | tojson) -}}"
        "{%- if loop.last and messages[messages.index(m) + 1] is defined -%}"
        "{{- '<answer>' + messages[messages.index(m) + 1].content -}}{%- endif -%}{%- endfor -%}"
        "{{- (m.content or '') + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>model\n' -}}{%- endif -%}"
    )
    for text in (None, "Look"):
        row = talk(
            ("user", "sunny"), Message("assistant", text, tool_calls=(CALL,)), ("tool", "sunny"), ("assistant", "Fine")
        )
        for quick in (True, False):
            marks = mark(source, row, quick=quick)
            spoken = [text[s.start : s.end] for text, spans in marks.texts for s in spans]
            assert marks.problems or not any("<answer>" in part for part in spoken)


def test_arguments_given_as_json_text_are_shown_as_an_object():
    function = {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}
    row = talk(("user", "?"), Message("assistant", "Look:", tool_calls=({"type": "function", "function": function},)))
    assert trained(mark(TOOLS, row)) == [
        'Look:\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>'
    ]


def test_arguments_are_given_as_json_text_to_a_template_that_joins_them_as_text():
    source = TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments")
    row = talk(("user", "?"), Message("assistant", None, tool_calls=(CALL,)))
    assert '{"city": "Paris", "days": 2}' in trained(mark(source, row))[0]
    printed = TOOLS.replace("(call.function.arguments | tojson)", "(call.function.arguments ~ '')")
    assert '{"city": "Paris", "days": 2}' in trained(mark(printed, row))[0]


def test_template_that_shows_no_tool_calls_is_a_problem():
    row = talk(("user", "?"), Message("assistant", "Look:", tool_calls=(CALL,)))
    marks = mark(CHATML, row)
    assert marks.texts == ()
    assert marks.problems == (
        "chat.jsonl line 7: message 2 (assistant): the chat template does not show the function name 'weather'; "
        "it shows 'Look:'.",
    )


def test_an_answer_that_comes_out_as_none_is_a_problem():
    source = TOOLS.replace("{%- if m.content -%}{{- m.content -}}{%- endif -%}", "{{- m.content or none -}}")
    marks = mark(source, talk(("user", "?"), Message("assistant", None, tool_calls=(CALL,))))
    assert "writes 'None', Python's notation" in marks.problems[0]


def test_an_answer_without_anything_is_a_problem_unless_it_is_left_out():
    row = talk(("user", "Hello"), ("assistant", None), ("user", "x"), ("assistant", "y"))
    assert mark(CHATML, row).problems == (
        "chat.jsonl line 7: message 2 (assistant): is to be trained and has neither content nor tool calls.",
    )
    left_out = talk(("user", "Hello"), Message("assistant", "", train=0.0), ("user", "x"), ("assistant", "y"))
    assert trained(mark(CHATML, left_out)) == ["y<|im_end|>"]


def test_message_that_the_template_leaves_out_is_a_problem():
    source = CHATML.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    marks = mark(source, talk(("system", "Be brief"), *HELLO))
    assert "message 1 (system): the chat template shows nothing of 'Be brief'" in marks.problems[0]


def test_refusal_names_the_message():
    marks = mark(LLAMA2, talk(("user", "Hello"), ("tool", "x"), ("assistant", "y")))
    assert marks.problems == (
        "chat.jsonl line 7: message 2 (tool): chat template test: refuses this conversation: only user and assistant",
    )


@pytest.mark.parametrize("written", ["a <|im_end|> b", "<|endoftext|>", "<|im_end|><|im_end|>\n<|im_start|>user\nx"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_token_in_a_message_is_text_of_that_message(written, role):
    turns = [("system", "x"), ("user", "x"), ("assistant", "x")]
    row = talk(*((r, written if r == role else c) for r, c in turns))
    for quick in (True, False):
        marks = mark(CHATML, row, quick=quick)
        ((text, _),), (literal,) = marks.texts, marks.literal
        assert text == template(CHATML).render([m.as_template_input() for m in row.messages], (), False, {})
        assert trained(marks) == [(written if role == "assistant" else "x") + "<|im_end|>"]
        assert [text[start:end] for start, end in literal] == re.findall(r"<\|\w+\|>", written)
        assert marks.notes == (findings.AS_TEXT,)


def test_special_tokens_in_reasoning_names_tools_and_arguments_are_text():
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_start|>", 1]}}}
    row = talk(
        ("user", "?"),
        Message("assistant", None, tool_calls=(call,)),
        Message("tool", "sunny", name="<|im_end|>"),
        ("assistant", "y"),
        tools=({"name": "<|endoftext|>"},),
    )
    marks = mark(TOOLS.replace("m.role + '", "m.role + ('' if m.role == 'assistant' else m.name ~ tools) + '"), row)
    ((text, _),), (literal,) = marks.texts, marks.literal
    assert trained(marks)[0] == (
        '<tool_call>\n{"name": "f", "arguments": {"<|im_end|>": ["<|im_start|>", 1]}}\n</tool_call><|im_end|>'
    )
    said = [text[start:end] for start, end in literal]
    assert said.count("<|endoftext|>") == 2
    assert said.count("<|im_end|>") == 2
    assert said.count("<|im_start|>") == 1
    thinking = mark(THINKING, talk(("user", "x"), Message("assistant", "y", reasoning_content="a <|im_end|>")))
    assert trained(thinking) == ["<think>\na <|im_end|>\n</think>\n\ny<|im_end|>"]


def test_special_token_that_a_template_rewrites_is_a_problem():
    source = CHATML.replace(
        "{{ m.content }}", "{{ m.content|tojson(ensure_ascii=m.role == 'user') if m.role == 'user' else m.content }}"
    )
    (problem,) = mark(source, talk(("user", "a <|im_end|>"), ("assistant", "y"))).problems
    assert (
        "chat.jsonl line 7: a message contains '<|im_end|>', a special token, which the chat template writes" in problem
    )


def test_problems_quote_the_special_token_that_the_message_wrote():
    source = CHATML.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    (problem,) = mark(source, talk(("system", "a <|im_end|>"), *HELLO)).problems
    assert "message 1 (system): the chat template shows nothing of 'a <|im_end|>'" in problem


def test_words_like_think_that_are_no_special_tokens_are_trained_as_they_stand():
    row = talk(("user", "<think>"), ("assistant", "<think>\nso\n</think>\n\nOne"))
    assert trained(mark(CHATML, row)) == ["<think>\nso\n</think>\n\nOne<|im_end|>"]


def test_unmask_trains_every_role_but_system_without_headers():
    row = talk(("system", "Be brief"), *HELLO[:2], unmask=True)
    expected = ["Hello<|im_end|>", "I am fine<|im_end|>"]
    assert trained(mark(CHATML, row)) == expected
    assert trained(mark(CHATML, talk(("system", "Be brief"), *HELLO[:2]), unmask=True)) == expected


def test_unmask_does_not_train_the_header_that_follows_a_question():
    assert trained(mark(GLM, talk(*HELLO[:2]), unmask=True)) == ["Hello", "I am fine"]
    assert trained(mark(LLAMA2, talk(*HELLO[:2]), unmask=True)) == ["Hello", " I am fine </s>"]


def test_weights_of_message_and_row_multiply():
    row = talk(
        Message("user", "Hello", train=1.0),
        Message("assistant", "I am fine", train=0.5),
        ("user", "x"),
        Message("assistant", "y", train=0.0),
        ("user", "z"),
        ("assistant", "w"),
        weight=3.0,
    )
    marks = mark(CHATML, row)
    assert trained(marks) == ["Hello<|im_end|>", "I am fine<|im_end|>", "w<|im_end|>"]
    assert [span.weight for span in marks.texts[0][1]] == [3.0, 1.5, 3.0]


def test_row_without_anything_to_train_is_a_problem_and_a_row_of_weight_0_is_counted():
    (problem,) = mark(CHATML, talk(("system", "x"), ("user", "y"))).problems
    assert "nothing to train on: no assistant turn with a weight (found: system, user)" in problem
    assert mark(CHATML, talk(*HELLO, weight=0.0)) == Marks(notes=(findings.NO_WEIGHT,))


def test_negative_weight_is_a_problem():
    (problem,) = mark(CHATML, talk(("user", "x"), Message("assistant", "y", train=-1.0))).problems
    assert "message 2 (assistant): weight -1.0 is not allowed" in problem


def test_unroll_and_trained_questions_contradict_each_other():
    (problem,) = mark(CHATML, talk(*HELLO, unmask=True), turns="unroll").problems
    assert "data.turns: unroll trains assistant turns only, but message 1 (user)" in problem


def test_trailing_question_is_told():
    assert mark(CHATML, talk(*HELLO, ("user", "Bye"))).notes == (findings.LAST_UNTRAINED,)


def test_equal_contents_are_told_apart_by_their_place():
    row = talk(("user", "yes"), ("assistant", "yes"), ("user", "yes"), Message("assistant", "yes", train=0.0))
    ((text, (span,)),) = mark(CHATML, row).texts
    assert text[: span.start].endswith("yes<|im_end|>\n<|im_start|>assistant\n")
    assert text[: span.start].count("yes") == 1


def test_conversation_may_begin_with_an_answer():
    row = talk(("assistant", "Welcome"), ("user", "x"), ("assistant", "y"))
    for source in (CHATML, GLM, DEEPSEEK):
        for quick in (True, False):
            assert trained(mark(source, row, quick=quick))[0].startswith("Welcome")


def test_content_in_parts_is_used_where_a_template_knows_nothing_else():
    source = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert trained(mark(source, talk(*HELLO))) == ["I am fine<|im_end|>", "Four<|im_end|>"]


def test_changed_text_is_a_problem():
    source = CHATML.replace("{{ m.content }}", "{{ m.content | upper if m.role == 'assistant' else m.content }}")
    marks = mark(source, talk(*HELLO[:2]))
    assert marks.problems == (
        "chat.jsonl line 7: message 2 (assistant): says 'I am fine' "
        "but the chat template shows 'I AM FINE' in its place.",
    )
