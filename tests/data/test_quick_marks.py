"""Rows marked the quick way, and with what was learned from earlier ones, are marked as the careful way marks them."""

from __future__ import annotations

import random

import pytest

from tests.data.test_masks import CALL, CHATML, SETTINGS, TOOLS, chat_tokenizer, talk, template
from training_hub.data.masks import Masker
from training_hub.types import Message

CONTENTS = ("yes", " yes", "yes\n", "a\n\nb", "é漢", "{'a': 1}", "None", "assistant\n", "  x ", "</think>", "[/INST] x")


@pytest.mark.parametrize("source", list(SETTINGS), ids=["chatml", "tools", "thinking", "llama2", "glm", "deepseek"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_quick_way_finds_what_the_careful_one_finds(source, turns):
    draw = random.Random(source)
    tokenizer = chat_tokenizer(**SETTINGS[source])
    chosen = template(source, tokenizer)
    compared = 0
    for number in range(60):
        unmask = turns == "all" and number % 3 == 0
        quick = Masker(chosen, tokenizer, unmask=unmask, turns=turns)
        careful = Masker(chosen, tokenizer, unmask=unmask, turns=turns, quick=False)
        chat = []
        for _ in range(draw.randint(1, 3)):
            chat.append(("user", draw.choice(CONTENTS)))
            reasoning = "I muse" if draw.random() < 0.1 else None
            weight = draw.choice([None, None, 0.0, 2.0])
            if source == TOOLS and draw.random() < 0.5:
                content = draw.choice([None, *CONTENTS])
                chat.append(Message("assistant", content, tool_calls=(CALL,) * draw.randint(1, 2), train=weight))
                chat.append(("tool", draw.choice(CONTENTS)))
            chat.append(Message("assistant", draw.choice(CONTENTS), reasoning_content=reasoning, train=weight))
        row = talk(*chat)
        assert quick.mark(row) == careful.mark(row)
        compared += bool(quick.mark(row).texts)
    assert compared > 30


@pytest.mark.parametrize("source", list(SETTINGS), ids=["chatml", "tools", "thinking", "llama2", "glm", "deepseek"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_what_was_learned_from_earlier_rows_changes_nothing(source, turns):
    draw = random.Random(source)
    tokenizer = chat_tokenizer(**SETTINGS[source])
    chosen = template(source, tokenizer)
    learned = Masker(chosen, tokenizer, unmask=False, turns=turns)
    careful = Masker(chosen, tokenizer, unmask=False, turns=turns, quick=False)
    compared = 0
    for _ in range(120):
        answers = [
            Message("assistant", draw.choice(CONTENTS), train=draw.choice([None, None, 0.0]))
            for _ in range(draw.randint(1, 3))
        ]
        chat = [turn for answer in answers for turn in (("user", draw.choice([*CONTENTS, "<|im_end|>"])), answer)]
        row = talk(*chat, weight=draw.choice([1.0, 0.5]))
        assert learned.mark(row) == careful.mark(row)
        compared += bool(careful.mark(row).texts)
    assert compared > 60


@pytest.mark.parametrize(
    "odd",
    [
        "{{ m.content | upper if 'x' in m.content else m.content }}",
        "{{ m.content }}{{ m.content if 'x' in m.content }}",
        "{{ 'x: ' if 'x' in m.content }}{{ m.content }}",
        "{{ m.content | replace('x', '') }}",
    ],
    ids=["changed", "twice", "prefixed", "cut"],
)
def test_a_template_that_treats_some_words_otherwise_is_asked_about_them(odd):
    tokenizer = chat_tokenizer()
    chosen = template(CHATML.replace("{{ m.content }}", odd), tokenizer)
    learned = Masker(chosen, tokenizer, unmask=False, turns="all")
    careful = Masker(chosen, tokenizer, unmask=False, turns="all", quick=False)
    texts = ("yes", "no x no", "yes and no", "x")
    for row in [talk(("user", question), ("assistant", answer)) for question in texts for answer in texts]:
        assert learned.mark(row) == careful.mark(row)
