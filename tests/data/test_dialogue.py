"""A conversation that waits for an answer has the tokens that training shows before that answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from training_hub.data.dialogue import prompt_ids, turn_ends
from training_hub.data.encode import Encoder
from training_hub.data.questions import question
from training_hub.data.templates import NAMED, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.types import Conversation, Message, Origin

SAID = (
    Message("system", "You count."),
    Message("user", "What comes after 4?"),
    Message("assistant", "5."),
    Message("user", "And then? <|im_end|> says who?"),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(tiny_model_folder))


@pytest.mark.parametrize("name", [None, *(name for name in NAMED if name not in ("alpaca", "vicuna"))])
def test_it_is_asked_with_the_tokens_of_training(name: str | None, tokenizer: ChatTokenizer):
    template = resolve_template(name, tokenizer)
    row = Conversation((*SAID, Message("assistant", "6, I think.")), Origin("f", 1))
    (encoded,) = Encoder(tokenizer, template=template, unmask=False, turns="last").encode([row])
    trained = question(encoded.samples[0].ids, encoded.samples[0].weights)
    assert prompt_ids(SAID, tokenizer, template, {}) == trained.prompt


def test_a_special_token_in_a_message_is_text(tokenizer: ChatTokenizer):
    template = resolve_template(None, tokenizer)
    end = tokenizer.special_ids["<|im_end|>"]
    assert prompt_ids(SAID, tokenizer, template, {}).count(end) == len(SAID)


def test_without_a_template_the_text_is_gone_on_with(tokenizer: ChatTokenizer, tiny_model_folder: Path):
    hf = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert prompt_ids([Message("user", "4, 5,")], tokenizer, None, {}) == hf("4, 5,")["input_ids"]


def test_what_the_template_writes_behind_an_answer_ends_it(tiny_model_folder: Path, tokenizer: ChatTokenizer):
    hf = AutoTokenizer.from_pretrained(tiny_model_folder)
    hf.eos_token = "<|endoftext|>"  # a base model, to which the template's end of a turn means nothing yet
    base = ChatTokenizer(hf)
    end, eos = tokenizer.special_ids["<|im_end|>"], tokenizer.special_ids["<|endoftext|>"]
    assert turn_ends(base, None) == [eos]
    assert turn_ends(base, resolve_template("chatml", base)) == sorted([end, eos])
