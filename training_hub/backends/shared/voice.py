"""A model that one can talk to: messages in, text out as it is made, whichever engine makes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training_hub.backends.shared.answers import Answer, Decoding, Prompt
from training_hub.backends.shared.materials import Limits
from training_hub.data.dialogue import prompt_ids, turn_ends
from training_hub.data.templates import ChatTemplate, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.evaluation.predictions import Reply
from training_hub.recipe import Recipe
from training_hub.types import Message

Stream = Callable[[Prompt, Decoding, Callable[[int], None]], Answer]
"""The answer to a prompt; the function is told of each of its tokens as it is made."""


@dataclass(frozen=True)
class Voice:
    """A model with what turns messages into its tokens and its tokens into text.

    stream: the model; limits: what it can read. stop_ids: what ends an answer.
    """

    stream: Stream
    limits: Limits
    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    arguments: Mapping[str, Any]
    stop_ids: tuple[int, ...]

    @property
    def has_template(self) -> bool:
        return self.template is not None

    def reply(
        self,
        messages: Sequence[Message],
        hear: Callable[[str], None],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Reply:
        """The model's answer to the last message; `hear` is told of its text piece by piece.

        Raises DataError where the conversation is longer than the model has positions for.
        """
        ids = prompt_ids(messages, self.tokenizer, self.template, self.arguments)
        pieces = _Pieces(self.tokenizer, hear)
        prompt = Prompt(ids, self._room(len(ids), max_new_tokens))
        began = time.perf_counter()
        answer = self.stream(prompt, Decoding(self.stop_ids, temperature, top_p, seed), pieces.take)
        seconds = time.perf_counter() - began
        text = self.tokenizer.hf.decode(list(answer.ids))
        pieces.finish(text)
        return Reply(text, answer.finish_reason, len(answer.ids), seconds)

    def _room(self, length: int, wanted: int) -> int:
        if not length:
            raise DataError("there is nothing to answer: the message is empty.")
        limits = self.limits
        left = None if limits.positions is None or not limits.is_hard else limits.positions - length
        if left is not None and left < 1:
            raise DataError(
                f"the conversation is {length:,} tokens long, and the model has {limits.positions:,} positions: /reset "
                "begins anew."
            )
        return wanted if left is None else min(wanted, left)


class _Pieces:
    """Turns tokens into text as they come: whole characters only, with the spaces that the whole text has."""

    def __init__(self, tokenizer: ChatTokenizer, hear: Callable[[str], None]):
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=False)
        self._tokenizer = tokenizer.hf.backend_tokenizer
        self._hear = hear
        self._said = ""

    def take(self, token: int) -> None:
        piece = self._stream.step(self._tokenizer, token)
        if piece:
            self._said += piece
            self._hear(piece)

    def finish(self, text: str) -> None:
        """Say what is left: bytes at the end that are no whole character."""
        if text.startswith(self._said) and len(text) > len(self._said):
            self._hear(text[len(self._said) :])


def open_voice(recipe: Recipe, load: Callable[[], tuple[Stream, Limits]]) -> Voice:
    """The model that `load` gives with its tokenizer and the template of data.chat_template, or its own.

    Raises RecipeError or DataError naming what is wrong with it.
    """
    model = recipe.model
    tokenizer = ChatTokenizer.load(
        model.tokenizer or model.path, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    template = resolve_template(recipe.data.chat_template, tokenizer)
    stops = tuple(turn_ends(tokenizer, template))
    return Voice(*load(), tokenizer, template, recipe.data.template_arguments, stops)
