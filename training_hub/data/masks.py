"""Which characters of a rendered conversation are trained: exactly those the model has to produce when it serves.

The text is the template's own, unmodified. Trained are, of each answer: its content, tool calls and reasoning as the
template shows them, from where the generation prompt ends to the token that ends the turn. A row where that cannot be
established is a problem, never a guess. The user's side of this is docs/guides/templates.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from training_hub.data.chat import Form, alternatives, content_problems, forms, masked, unmasked, written
from training_hub.data.findings import (
    AS_TEXT,
    LAST_UNTRAINED,
    NO_STOP,
    NO_STOP_ID,
    NO_WEIGHT,
    PROMPT_DIFFERS,
    UNSTEADY,
    refusal,
    turn_notes,
    turn_problems,
    unshown,
    where,
)
from training_hub.data.quick import Shape, Wanted, learn_shape, place_quickly, plain_words
from training_hub.data.regions import (
    Closers,
    Habits,
    Place,
    Stage,
    Turn,
    learn_habits,
    locate_alone,
    locate_answer,
    locate_other,
)
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.types import Conversation


@dataclass(frozen=True, slots=True)
class Span:
    """Characters start:end of a text, trained with `weight`. `message` counts from 1."""

    start: int
    end: int
    weight: float
    message: int


@dataclass(frozen=True, slots=True)
class Marks:
    """What is trained of a conversation: texts, each with its spans from left to right.

    One text, or one per answer with turns "unroll". With problems there are no texts. `literal` has for each text the
    places of special tokens that a message wrote, to be read as plain text; it is empty where no message has any.
    """

    texts: tuple[tuple[str, tuple[Span, ...]], ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    literal: tuple[tuple[tuple[int, int], ...], ...] = ()


class Masker:
    """Finds the trained characters of conversations for one template and tokenizer.

    `quick` first tries to place all turns of a row with one more rendering or none; the result is the same without it.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: ChatTokenizer, *, unmask: bool, turns: str, quick: bool = True
    ):
        self.template = template
        self.unmask = unmask
        self.turns = turns
        self.quick = quick
        special = alternatives([*tokenizer.special_ids, *tokenizer.stop_tokens])
        self.closers = Closers(special, tokenizer.stop_tokens)
        self._habits: dict[tuple[str, bool], Habits | None] = {}
        self._shapes: dict[tuple[Any, ...], Shape | None] = {}
        self._parts: bool | None = None

    def mark(self, row: Conversation) -> Marks:
        """The trained spans of `row`, or its problems, each naming the row and the message."""
        words = plain_words(row, self.closers.special) if self.quick and self.turns != "unroll" else None
        if words is not None and (marks := self._by_shape(row, words)):
            return marks
        problems = content_problems(row)
        if problems:
            return Marks(problems=tuple(problems))
        shown, stand_ins = masked(row, self.closers.special, self.template.source + (self.template.tool_source or ""))
        marks = self._marked(shown)
        return _with_special_tokens(row, marks, stand_ins) if stand_ins else marks

    def _by_shape(self, row: Conversation, words: Sequence[str]) -> Marks | None:
        """The marks of a row of plain messages in roles seen before; None where its text is not as it was then."""
        shape = self._shapes.get(_shape_of(row))
        if shape is None or not all(words[each.index].strip() for each, _, _ in shape.turns):
            return None
        messages = [written(message, shape.form) for message in row.messages]
        try:
            text = self.template.render(messages, (), False, row.template_arguments)
        except DataError:
            return None  # told by the careful way, with the message it comes from
        places = shape.places(text, words, self.closers)
        return self._settled(text, [each for each, _, _ in shape.turns], places, shape.notes) if places else None

    def _learn_shape(
        self, stage: Stage, row: Conversation, wanted: Sequence[Wanted], habits: Habits | None, marks: Marks
    ) -> None:
        """Keep what the template put around the words of this row, if that finds the same marks."""
        key = _shape_of(row)
        words = plain_words(row, self.closers.special)
        if words is None or key in self._shapes:
            return
        if len(self._shapes) > 4096:  # rows that all differ would fill the memory
            self._shapes.clear()
        stops = frozenset((NO_STOP, NO_STOP_ID))
        notes = tuple(note for note in marks.notes if note not in stops)
        shape = learn_shape(stage, row, wanted, habits, notes)
        places = shape.places(stage.full, words, self.closers) if shape else None
        found = places and self._settled(stage.full, wanted, places, notes)
        self._shapes[key] = shape if found == marks else None

    def _marked(self, row: Conversation) -> Marks:
        wanted = self._wanted(row)
        if isinstance(wanted, Marks):
            return wanted
        best, best_rendered = Marks(), False
        for form in forms(row, self._needs_parts()):
            marks, rendered = self._mark_in(form, row, wanted)
            if not marks.problems:
                return marks
            # What is wrong with a rendering tells more than that another form made the template fail.
            if not best.problems or (rendered and not best_rendered):
                best, best_rendered = marks, rendered
        return best

    def _wanted(self, row: Conversation) -> list[Wanted] | Marks:
        """The messages to train, or why none can be."""
        everyone = self.unmask or row.unmask
        wanted, problems = [], []
        for index, message in enumerate(row.messages):
            is_answer = message.role == "assistant"
            by_role = is_answer or (everyone and message.role != "system")
            weight = (float(by_role) if message.train is None else float(message.train)) * row.weight
            if not math.isfinite(weight) or weight < 0:
                problems.append(f"{where(row, index)}: weight {weight} is not allowed; use 0 or a positive number.")
            elif weight > 0:
                wanted.append(Wanted(index, weight, is_answer))
                if not (message.content or "").strip() and not message.tool_calls:
                    problems.append(f"{where(row, index)}: is to be trained and has neither content nor tool calls.")
        if problems:
            return Marks(problems=tuple(problems))
        return self._selected(row, wanted)

    def _selected(self, row: Conversation, wanted: list[Wanted]) -> list[Wanted] | Marks:
        if row.weight == 0:
            return Marks(notes=(NO_WEIGHT,))
        if not wanted:
            roles = ", ".join(dict.fromkeys(message.role for message in row.messages)) or "no messages"
            return Marks(
                problems=(f"{row.origin}: nothing to train on: no assistant turn with a weight (found: {roles}).",)
            )
        if self.turns == "all":
            return wanted
        others = [each for each in wanted if not each.is_answer]
        if others:
            number = others[0].index + 1
            problem = (
                f"{row.origin}: data.turns: {self.turns} trains assistant turns only, but message {number} "
                f"({row.messages[number - 1].role}) is to be trained by unmask or its train key. Use data.turns: all."
            )
            return Marks(problems=(problem,))
        return wanted[-1:] if self.turns == "last" else wanted

    def _needs_parts(self) -> bool:
        """Whether the template shows text only as a list of parts, as some of models that also see pictures do."""
        if self._parts is None:
            probe = "\ue010probe\ue011"
            seen = []
            for content in (probe, [{"type": "text", "text": probe}]):
                try:
                    seen.append(probe in self.template.render([{"role": "user", "content": content}], (), False, {}))
                except DataError:
                    seen.append(False)
            self._parts = seen == [False, True]
        return self._parts

    def _mark_in(self, form: Form, row: Conversation, wanted: Sequence[Wanted]) -> tuple[Marks, bool]:
        """The marks with the conversation in this form, and whether the template rendered it."""

        def render(messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
            return self.template.render(messages, row.tools, prompt, row.template_arguments)

        stage = Stage([written(message, form) for message in row.messages], render, form)
        try:
            text = stage.full
        except DataError as error:
            return Marks(problems=(refusal(row, stage, error),)), False
        problems = unshown(row, text)
        if problems:
            return Marks(problems=tuple(problems)), True
        key = (json.dumps(row.template_arguments, sort_keys=True, default=str), bool(row.tools))
        if key not in self._habits:
            if len(self._habits) > 256:  # arguments that differ from row to row would fill the memory
                self._habits.clear()
            self._habits[key] = learn_habits(render, self.closers, form)
        habits = self._habits[key]
        if self.turns == "unroll":
            return self._unrolled(stage, row, wanted, habits), True
        found = place_quickly(stage, row, wanted, habits, self.closers) if self.quick else None
        if found is None:
            return self._carefully(stage, row, wanted, habits), True
        marks = self._joined(row, text, found)
        self._learn_shape(stage, row, wanted, habits, marks)
        return marks, True

    def _carefully(self, stage: Stage, row: Conversation, wanted: Sequence[Wanted], habits: Habits | None) -> Marks:
        """Each turn by itself, and every finding checked against what the message says."""
        found: list[tuple[Wanted, Turn]] = []
        problems: list[str] = []
        notes: list[str] = []
        for each in wanted:
            turn = self._turn(stage, each, habits)
            if turn is None:
                problems.append(
                    f"{where(row, each.index)}: cannot tell where the chat template shows this message; "
                    "data.turns: unroll may, or another data.chat_template."
                )
                continue
            found.append((each, turn))
            problems += turn_problems(row, each.index, stage.full, turn.place)
            notes += turn_notes(row.messages[each.index], stage.full, turn)
        problems += _order_problems(row, found)
        if problems:
            return Marks(problems=tuple(problems))
        joined = self._joined(row, stage.full, found)
        return Marks(joined.texts, (), _once([*joined.notes, *notes]))

    def _turn(self, stage: Stage, each: Wanted, habits: Habits | None) -> Turn | None:
        if each.is_answer:
            return locate_answer(stage, each.index, self.closers, habits.header if habits else None)
        place = locate_other(stage, each.index, self.closers)
        return Turn(place, True, True, None) if place else None

    def _unrolled(self, stage: Stage, row: Conversation, wanted: Sequence[Wanted], habits: Habits | None) -> Marks:
        """One text per answer: the conversation up to it, as serving shows it, trained on that answer only."""
        texts: list[tuple[str, tuple[Span, ...]]] = []
        problems: list[str] = []
        notes: list[str] = []
        for each in wanted:
            alone = locate_alone(stage, each.index, self.closers, habits.header if habits else None)
            if alone is None:
                problems.append(
                    f"{where(row, each.index)}: the chat template does not show the conversation up to here."
                )
                continue
            text, place = alone
            part = Conversation(row.messages[: each.index + 1], row.origin)
            problems += turn_problems(part, each.index, text, place)
            prompt = stage.upto(each.index, prompt=True) if each.index else None
            turn = Turn(place, True, text.startswith(prompt or ""), alone)
            notes += turn_notes(row.messages[each.index], text, turn)
            joined = self._joined(part, text, [(each, turn)])
            notes += joined.notes
            texts += joined.texts
        if problems:
            return Marks(problems=tuple(problems))
        return Marks(tuple(texts), (), _once(notes))

    def _joined(self, row: Conversation, text: str, found: Sequence[tuple[Wanted, Turn]]) -> Marks:
        notes = []
        for _, turn in found:
            notes += [UNSTEADY] * (not turn.steady) + [PROMPT_DIFFERS] * (not turn.prompted)
        if found[-1][0].index < len(row.messages) - 1 and row.messages[-1].role != "assistant":
            notes.append(LAST_UNTRAINED)
        return self._settled(text, [each for each, _ in found], [turn.place for _, turn in found], notes)

    def _settled(self, text: str, wanted: Sequence[Wanted], places: Sequence[Place], notes: Sequence[str]) -> Marks:
        """The marks of one text with every wanted message at its place."""
        notes = list(notes)
        spans = []
        for each, place in zip(wanted, places, strict=True):
            spans.append(Span(place.start, place.closed, each.weight, each.index + 1))
            if each.is_answer and not place.stops:
                notes.append(NO_STOP if place.closed == place.end else NO_STOP_ID)
        return Marks(((text, tuple(spans)),), (), _once(notes))


def _shape_of(row: Conversation) -> tuple[Any, ...]:
    """What, besides their words, decides how plain messages are shown and which of them are trained."""
    given = row.template_arguments
    arguments = json.dumps(given, sort_keys=True, default=str) if given else ""
    return arguments, row.unmask, row.weight, *[(message.role, message.train) for message in row.messages]


def _with_special_tokens(row: Conversation, marks: Marks, stand_ins: Mapping[str, str]) -> Marks:
    """The marks with the special tokens that messages wrote in place of the characters that stood for them."""
    problems = []
    for problem in marks.problems:
        for character, token in stand_ins.items():
            problem = problem.replace(character, token)
        problems.append(problem)
    for character, token in stand_ins.items():
        if any(json.dumps(character)[1:-1] in text for text, _ in marks.texts):
            problems.append(
                f"{row.origin}: a message contains {token!r}, a special token, which the chat template writes "
                "in another way, so that it could not be found again. Remove it from the text."
            )
    if problems:
        return Marks(problems=tuple(problems))
    texts, literal = [], []
    for text, spans in marks.texts:
        whole, places, moved = unmasked(text, stand_ins)
        texts.append((whole, tuple(replace(span, start=moved(span.start), end=moved(span.end)) for span in spans)))
        literal.append(tuple(places))
    notes = _once([*marks.notes, AS_TEXT]) if any(literal) else marks.notes
    return Marks(tuple(texts), (), notes, tuple(literal))


def _order_problems(row: Conversation, found: Sequence[tuple[Wanted, Turn]]) -> list[str]:
    return [
        f"{where(row, second.index)}: the chat template shows it inside or before message {first.index + 1}."
        for (first, before), (second, turn) in pairwise(found)
        if turn.place.start < before.place.closed
    ]


def _once(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(set(notes))) if notes else ()
