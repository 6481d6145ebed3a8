"""Rows to token samples with exact weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training_hub.data.chat import half_character
from training_hub.data.masks import Masker, Span
from training_hub.data.templates import ChatTemplate, TemplateStopped, no_template
from training_hub.data.tokenizer import ChatTokenizer, Encoding, Tokenised
from training_hub.errors import DataError
from training_hub.types import Conversation, Row, Sample, Text, Tokens

JOINED_START = "a token joins the end of the prompt with the start of what is trained; it is trained as a whole"
TURNS = ("all", "last", "unroll")


@dataclass(frozen=True)
class Encoded:
    """What a row became. `problems` name the row and message; with any there are no samples. `notes` can be counted."""

    samples: tuple[Sample, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text on its way through the tokenizer, for the row at `row`."""

    row: int
    text: str
    spans: tuple[Span, ...]
    literal: tuple[tuple[int, int], ...] = ()


class Encoder:
    """Turns rows into samples, for one tokenizer and one way of masking.

    `template` may be None as long as no row is a conversation.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, template: ChatTemplate | None, unmask: bool, turns: str):
        if turns not in TURNS:
            raise DataError(f"data.turns: {turns!r} is not known; allowed: {', '.join(TURNS)}.")
        self.tokenizer = tokenizer
        self.masker = Masker(template, tokenizer, unmask=unmask, turns=turns) if template else None
        self._special = np.zeros(tokenizer.vocab_size, bool)
        self._special[list(tokenizer.special_ids.values())] = True

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """One result per row, in order. All texts of a call go through the tokenizer together.

        Raises DataError, which no row of the next call should be tried after, where the chat template is stopped.
        """
        pieces: list[_Piece] = []
        results = [self._begin(index, row, pieces) for index, row in enumerate(rows)]
        usual = [piece for piece in pieces if not piece.literal]
        encodings = iter(self.tokenizer.tokenise([piece.text for piece in usual]) if usual else [])
        for piece in pieces:
            row, before = rows[piece.row], results[piece.row]
            try:
                encoding = (
                    self.tokenizer.encode_literally(piece.text, piece.literal) if piece.literal else next(encodings)
                )
            except DataError as error:
                results[piece.row] = Encoded(problems=(f"{row.origin}: {error}",))
                continue
            results[piece.row] = self._finish(row, before, piece, encoding)
        return results

    def _begin(self, index: int, row: Row, pieces: list[_Piece]) -> Encoded:
        """The result so far; what is still to be tokenised is added to `pieces`."""
        if isinstance(row, Tokens):
            return self._checked(row)
        if isinstance(row, Text):
            text, spans = _segments(row)
            wrong = half_character(text) if text else "the text is empty"
            problems = (f"{row.origin}: {wrong}.",) if wrong else ()
            if not wrong:
                pieces.append(_Piece(index, text, spans))
            return Encoded(problems=problems)
        if self.masker is None:
            return Encoded(problems=(no_template(str(row.origin)),))
        try:
            marks = self.masker.mark(row)
        except TemplateStopped as error:
            raise DataError(f"{row.origin}: {error} The rows behind it were not tried.") from error
        literal = marks.literal or ((),) * len(marks.texts)
        pieces.extend(
            _Piece(index, text, spans, places) for (text, spans), places in zip(marks.texts, literal, strict=True)
        )
        return Encoded(problems=marks.problems, notes=marks.notes)

    def _finish(self, row: Row, before: Encoded, piece: _Piece, encoding: Tokenised | Encoding) -> Encoded:
        if before.problems:
            return before
        ids, weights, joined, lost = weigh(encoding, piece.spans, self._special)
        if lost and isinstance(row, Conversation):
            return Encoded(
                problems=tuple(f"{row.origin}: message {s.message}: no token lies in its text." for s in lost)
            )
        if isinstance(row, Text):
            ids, weights = self._closed(row, ids, weights)
        if len(weights):
            weights[0] = 0.0
        notes = (*before.notes, JOINED_START) if joined and JOINED_START not in before.notes else before.notes
        return Encoded((*before.samples, Sample(ids, weights, row.origin)), (), notes)

    def _closed(self, row: Text, ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With what the tokenizer puts in front of a text by itself, and the end-of-sequence token."""
        eos = self.tokenizer.eos_id
        own = self.tokenizer.around[0] if row.begins else []
        front = [i for i in own if not (len(ids) and ids[0] == i)]
        back = [eos] if row.ends and eos is not None and not (len(ids) and ids[-1] == eos) else []
        if not front and not back:
            return ids, weights
        last = row.segments[-1][1]
        ids = np.concatenate([np.array(front, np.int32), ids, np.array(back, np.int32)])
        weights = np.concatenate([np.zeros(len(front), np.float32), weights, np.full(len(back), last, np.float32)])
        return ids, weights

    def _checked(self, row: Tokens) -> Encoded:
        size = self.tokenizer.vocab_size
        if len(row.ids) == 0 or len(row.ids) != len(row.weights):
            return Encoded(problems=(f"{row.origin}: {len(row.ids)} input_ids and {len(row.weights)} weights.",))
        wrong = np.flatnonzero((row.ids < 0) | (row.ids >= size))
        if len(wrong):
            value, place = int(row.ids[wrong[0]]), int(wrong[0])
            return Encoded(
                problems=(
                    f"{row.origin}: input_ids[{place}] is {value}; this tokenizer's vocabulary has {size} entries, 0 "
                    f"to {size - 1}. Were the rows tokenised with another tokenizer?",
                )
            )
        weights = np.array(row.weights, np.float32)
        weights[0] = 0.0
        return Encoded((Sample(np.asarray(row.ids, np.int32), weights, row.origin),))


def weigh(
    encoding: Tokenised | Encoding, spans: Iterable[Span], special: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool, list[Span]]:
    """(ids [T], weights [T] float32, whether a token joins text before a span with it, spans without any token).

    A token is trained if it begins in a span, or is text that begins before and reaches into it: at "ASSISTANT: " many
    tokenizers make " Yes" one token, and leaving it out would leave out the answer. Special tokens never count by
    reaching: one that swallows the white space behind it (Phi's <|assistant|>) still belongs to the header.
    """
    ids = encoding.ids if isinstance(encoding, Tokenised) else encoding[0]
    weights = np.zeros(len(ids), np.float32)
    joined, lost = False, []
    for span in spans:
        if span.end <= span.start:
            continue
        first, begins, last = _tokens_of(encoding, span, special)
        if first < begins:
            joined = joined or bool((weights[first:begins] < span.weight).any())
        weights[first:last] = np.maximum(weights[first:last], span.weight)
        if first >= last:
            lost.append(span)
    return ids, weights, joined, lost


def _tokens_of(encoding: Tokenised | Encoding, span: Span, special: np.ndarray) -> tuple[int, int, int]:
    """(first, first that begins in the span, behind the last) of the tokens that the span trains."""
    if isinstance(encoding, Tokenised):
        within = encoding.between(span.start, span.end)
        if within is not None:
            return within[0], *within
        encoding = encoding.arrays()
    ids, starts, ends = encoding
    begins, last = (int(place) for place in np.searchsorted(starts, (span.start, span.end)))
    first = begins
    while first > 0 and ends[first - 1] > span.start and not special[ids[first - 1]]:
        first -= 1
    return first, begins, last


def _segments(row: Text) -> tuple[str, tuple[Span, ...]]:
    # Joined before tokenising: tokens then are those of the whole text, and SentencePiece adds its leading space once.
    spans, at = [], 0
    for number, (segment, weight) in enumerate(row.segments, start=1):
        spans.append(Span(at, at + len(segment), weight, number))
        at += len(segment)
    return "".join(segment for segment, _ in row.segments), tuple(spans)
