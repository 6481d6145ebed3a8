"""Templates render as transformers renders them, and fail in words a user can act on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.data.tiny import CHATML, chat_tokenizer, hf_tokenizer, template
from training_hub.data.templates import NAMED, ChatTemplate, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError

CHAT = [
    {"role": "user", "content": "Hello <b>&'there'</b>"},
    {"role": "assistant", "content": "I am fine.\n"},
    {"role": "user", "content": " And  you? "},
    {"role": "assistant", "content": "Four: 漢"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<x> é", "parameters": {"type": "object"}}}]


def as_transformers(source: str, messages, tools=(), add_generation_prompt=False, **variables) -> str:
    rendered, _ = render_jinja_template(
        [messages],
        tools=list(tools) or None,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return rendered[0]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("messages", [CHAT, SYSTEM, CHAT[:3]], ids=["chat", "system", "question"])
@pytest.mark.parametrize("prompt", [False, True])
def test_named_templates_render_as_transformers_renders_them(name, messages, prompt):
    hf = hf_tokenizer(bos="<|endoftext|>")
    chosen = resolve_template(name, ChatTokenizer.wrap(hf))
    expected = hf.apply_chat_template(
        messages, chat_template=chosen.source, tokenize=False, add_generation_prompt=prompt
    )
    assert chosen.render(messages, (), prompt, {}) == expected


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_close_every_answer_with_the_end_of_sequence_token(name):
    tokenizer = chat_tokenizer(eos="<|endoftext|>")
    text = resolve_template(name, tokenizer).render(CHAT, (), False, {})
    assert text.count("<|endoftext|>") >= 2
    assert text.rstrip().endswith("<|endoftext|>")


def test_chatml_is_plain_chatml_where_its_token_is_the_end_of_sequence():
    text = resolve_template("chatml", chat_tokenizer()).render(CHAT[:2], (), True, {})
    assert text == (
        "<|im_start|>user\nHello <b>&'there'</b><|im_end|>\n<|im_start|>assistant\nI am fine.\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_jinja_surroundings_are_those_of_transformers():
    source = (
        "{% for m in messages %}\n    {% if loop.index0 == 3 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}\n"
        "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ dict(a='<é>') | tojson(indent=1) }}"
        "{{ tools | tojson }}{{ date_string is defined }}{{ x | tojson(sort_keys=true, separators=(',', ':')) }}"
    )
    variables = {"x": {"b": 1, "a": [None, True]}, "bos_token": "<s>"}
    ours = ChatTemplate("t", source, {"bos_token": "<s>"}).render(CHAT, TOOLS, False, {"x": variables["x"]})
    assert ours == as_transformers(source, CHAT, TOOLS, **variables)


def test_messages_without_content_have_no_content_key():
    source = "{% for m in messages %}[{{ m.content is defined }}|{{ m.content }}|{{ m.thinking }}]{% endfor %}"
    messages = [{"role": "assistant", "content": None, "reasoning_content": "so"}]
    assert template(source).render(messages, (), False, {}) == "[False||so]"


def test_arguments_reach_the_template_and_win_over_special_tokens():
    chosen = ChatTemplate("t", "{{ bos_token }}{{ enable_thinking }}", {"bos_token": "<s>"})
    assert chosen.render([], (), False, {"enable_thinking": False, "bos_token": "!"}) == "!False"


def test_the_date_is_the_same_every_day_unless_given():
    chosen = template("{{ strftime_now('%d %b %Y') }}")
    assert chosen.render([], (), False, {}) == "01 Jan 2025"
    assert chosen.render([], (), False, {"strftime_now": "2026-05-03"}) == "03 May 2026"
    with pytest.raises(DataError, match=r"template_arguments.strftime_now: 'today' is not a day; write it as"):
        chosen.render([], (), False, {"strftime_now": "today"})


def test_refusal_of_a_template_is_told_in_its_own_words():
    with pytest.raises(DataError, match="refuses this conversation: only user and assistant"):
        template("{{ raise_exception('only user and assistant') }}").render(CHAT, (), False, {})


def test_failure_names_the_line_of_the_template():
    with pytest.raises(DataError, match=r"chat template test, line 3: UndefinedError"):
        template("{% for m in messages %}\n\n{{ m.content + m.nothing }}\n{% endfor %}").render(CHAT, (), False, {})


def test_syntax_error_names_its_line_when_the_template_is_chosen(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfo %}")
    with pytest.raises(DataError, match=r"mine.jinja, line 3: syntax error"):
        resolve_template(str(file), chat_tokenizer())


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        DataError, match=r"known names: chatml, zephyr, llama, alpaca, vicuna, mistral. Did you mean 'chatml'"
    ):
        resolve_template("chatlm", chat_tokenizer())


def test_file_and_own_template_are_found(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert resolve_template(str(file), chat_tokenizer()).source == CHATML
    assert resolve_template(None, chat_tokenizer(template=CHATML)).source == CHATML
    assert resolve_template(None, chat_tokenizer()) is None


def test_of_several_own_templates_the_one_for_tools_is_used_with_tools():
    own = {"default": "plain", "tool_use": "with tools"}
    chosen = resolve_template(None, chat_tokenizer(template=own))
    assert chosen.render(CHAT, (), False, {}) == "plain"
    assert chosen.render(CHAT, TOOLS, False, {}) == "with tools"
    with pytest.raises(DataError, match=r"several \(rag, tool_use\) and none is called 'default'"):
        resolve_template(None, chat_tokenizer(template={"rag": "x", "tool_use": "y"}))


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ namespace(__x=1) }}"])
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(DataError, match="SecurityError"):
        template(source).render(CHAT, (), False, {})


def test_only_plain_data_is_shown_to_a_template():
    messages = [{"role": "user", "content": "x", "image": np.zeros(2)}]
    with pytest.raises(DataError, match="a ndarray cannot be shown to a chat template"):
        template(CHATML).render(messages, (), False, {})


def test_fingerprint_follows_source_and_special_tokens():
    prints = {
        ChatTemplate("a", CHATML).fingerprint,
        ChatTemplate("b", CHATML).fingerprint,
        ChatTemplate("a", CHATML + " ").fingerprint,
        ChatTemplate("a", CHATML, {"bos_token": "<s>"}).fingerprint,
    }
    assert len(prints) == 3


def test_published_templates_render_as_transformers_renders_them():
    folder = os.environ.get("TRAINING_HUB_TEST_DATA")
    if not folder:
        pytest.skip("TRAINING_HUB_TEST_DATA is not set: no published templates to compare with")
    compared = 0
    for file in sorted(Path(folder, "templates").glob("*/*.jinja")):
        source = file.read_text(encoding="utf-8")
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        for messages in (CHAT, SYSTEM, CHAT[:3]):
            for prompt in (False, True):
                try:
                    expected = as_transformers(source, messages, TOOLS, prompt, **special, date_string="1 May 2026")
                except Exception:  # the template refuses: so must ours
                    with pytest.raises(DataError):
                        ChatTemplate(file.name, source, special).render(messages, TOOLS, prompt, {})
                    continue
                if "strftime_now" in source and "date_string" not in source:
                    continue
                ours = ChatTemplate(file.name, source, special)
                assert ours.render(messages, TOOLS, prompt, {"date_string": "1 May 2026"}) == expected, file.name
                compared += 1
    assert compared > 200
