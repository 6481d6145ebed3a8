"""A conversation that waits for an answer, as tokens: those that training shows before the answer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training_hub.data.chat import alternatives, masked, unmasked
from training_hub.data.encode import Encoder
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.types import Conversation, Message, Origin

CHAT = Origin("chat", 1, "message")
EXAMPLE = (Message("user", "Hello"), Message("assistant", "Hello."))


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: ChatTokenizer,
    template: ChatTemplate | None,
    arguments: Mapping[str, Any],
) -> list[int]:
    """Token ids up to where the assistant begins to speak; a special token in a message is the text it is written as.

    Without a template the model goes on with the text of the messages, which is then put together with nothing between.
    Raises DataError where the template refuses the conversation.
    """
    if template is None:
        text = "".join(message.content or "" for message in messages)
        ids, _, _ = tokenizer.encode_batch([text])[0]
        front = [token for token in tokenizer.around[0] if not (len(ids) and ids[0] == token)]
        return [*front, *ids.tolist()]
    special = alternatives([*tokenizer.special_ids, *tokenizer.stop_tokens])
    row = Conversation(tuple(messages), CHAT, template_arguments=dict(arguments))
    shown, stand_ins = masked(row, special, template.source)
    text = template.render([message.as_template_input() for message in shown.messages], (), True, arguments)
    whole, places, _ = unmasked(text, stand_ins)
    encoded = tokenizer.encode_literally(whole, places) if places else tokenizer.encode_batch([whole])[0]
    return list(encoded[0].tolist())


def turn_ends(tokenizer: ChatTokenizer, template: ChatTemplate | None) -> list[int]:
    """The ids that end an answer: the tokenizer's own, and the special tokens that the template writes behind one."""
    ends = set(tokenizer.stop_ids)
    if template is None:
        return sorted(ends)
    try:
        (encoded,) = Encoder(tokenizer, template=template, unmask=False, turns="last").encode(
            [Conversation(EXAMPLE, CHAT)]
        )
    except DataError:
        return sorted(ends)  # a template for other roles than these; it says so where it is used
    special = set(tokenizer.special_ids.values())
    for sample in encoded.samples:
        trained = sample.ids[np.flatnonzero(sample.weights)].tolist()
        ends |= set(itertools.takewhile(special.__contains__, reversed(trained)))
    return sorted(ends)
