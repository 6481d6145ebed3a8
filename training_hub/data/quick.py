"""The quick ways to place all trained turns of a row, instead of several renderings for each turn.

`place_quickly` takes one rendering more than the text itself. It settles plain text and tool calls, and hands
everything else back. A `Shape`, learned from a row it settled, takes none more for rows of plain text in the same
roles: their text is compared with what the template puts around any words. What is settled in either way, the careful
way of regions.py finds the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from training_hub.data.chat import Form, half_character
from training_hub.data.findings import turn_problems
from training_hub.data.regions import Closers, Habits, Place, Stage, Turn, close_other
from training_hub.types import Conversation, Message


@dataclass(frozen=True, slots=True)
class Wanted:
    """A message to be trained: its index from 0, the weight of its tokens, and whether the model generates it."""

    index: int
    weight: float
    is_answer: bool


def place_quickly(
    stage: Stage, row: Conversation, wanted: Sequence[Wanted], habits: Habits | None, closers: Closers
) -> list[tuple[Wanted, Turn]] | None:
    """Every wanted message with its turn, None where more than one rendering is needed to tell."""
    places = _places(stage, row, wanted, habits, closers) if habits else None
    if places is None or habits is None:
        return None
    found = []
    for each, place in zip(wanted, places, strict=True):
        steady = _is_steady(stage, row, each, place, habits, closers)
        found.append((each, Turn(place, steady, _is_prompted(stage, row, each, habits), None)))
    return found


def _places(
    stage: Stage, row: Conversation, wanted: Sequence[Wanted], habits: Habits, closers: Closers
) -> list[Place] | None:
    """All places from one rendering with a sentinel in every trained turn; None where that does not settle it."""
    if not all(_is_simple(message) for message in row.messages):
        return None
    if any(first.role == second.role == "assistant" for first, second in pairwise(row.messages)):
        return None
    swapped = stage.with_sentinels([each.index for each in wanted], len(row.messages))
    if swapped is None:
        return None
    pieces = swapped.split(stage.sentinel)
    places, at = [], 0
    for each, before, behind in zip(wanted, pieces, pieces[1:], strict=False):
        message, shown = row.messages[each.index], at + len(before)
        if message.tool_calls:
            end = _end_of_calls(stage.full, shown, behind, closers)
        else:
            end = _end_of_content(stage.full, message.content or "", shown, behind)
        place = end and _simple_place(stage.full, message, shown, end, before, habits, closers)
        if not place or not stage.full.startswith(before, at):
            return None
        if message.tool_calls and not _calls_alone(stage, row, each.index, place, habits):
            return None
        places.append(place)
        at = place.end
    return places if stage.full[at:] == pieces[-1] else None


def _end_of_calls(text: str, shown: int, behind: str, closers: Closers) -> int | None:
    """Where `behind` follows, if it begins with a special token: no tool call can hold one, so the first is it."""
    return text.find(behind, shown) if closers.special_at(behind, 0) and behind in text[shown:] else None


def _calls_alone(stage: Stage, row: Conversation, index: int, place: Place, habits: Habits) -> bool:
    """Whether the conversation up to this turn ends in the same text: then nothing of later turns is in it.

    Some templates show the tool's answer inside the turn that called it, and text that came with the call behind that.
    """
    alone = stage.upto(index + 1)
    region = stage.full[place.shown : place.end]
    return (
        alone is not None
        and alone.endswith(region + habits.tails["assistant"])
        and not turn_problems(row, index, stage.full, place)
    )


def _is_prompted(stage: Stage, row: Conversation, each: Wanted, habits: Habits) -> bool:
    """Whether the turn is shown behind the whole generation prompt: by habit behind a question, else by asking."""
    if not each.is_answer or each.index == 0:
        return True
    if row.messages[each.index - 1].role == "user":
        return habits.prompted
    prompt = stage.upto(each.index, prompt=True)
    alone = stage.upto(each.index + 1)
    return prompt is None or alone is None or alone.startswith(prompt)


def _is_steady(stage: Stage, row: Conversation, each: Wanted, place: Place, habits: Habits, closers: Closers) -> bool:
    """Whether the turn would look the same as the last one: by habit for plain text, else asking the template."""
    if not each.is_answer or each.index == len(row.messages) - 1:
        return True
    with_calls = any(message.tool_calls for message in row.messages)
    # Habits are of answers; a conversation that begins with one may be shown in another way.
    if not with_calls and each.index and (habits.steady or _is_between_questions(row, each.index)):
        return habits.steady
    alone = stage.upto(each.index + 1)
    if alone is None or not alone.startswith(stage.full[: place.end]):
        return False
    closed, _ = closers.behind(alone, place.end, alone[place.end :])
    return stage.full.startswith(alone[:closed])


def _simple_place(
    text: str, message: Message, shown: int, end: int, before: str, habits: Habits, closers: Closers
) -> Place | None:
    tail = habits.tails.get(message.role)
    if tail is None:
        return None
    if message.role != "assistant":
        return Place(shown, shown, end, *close_other(text, end, tail, closers))
    lead = _lead(before, habits)
    if lead is None:
        return None
    return Place(shown - lead, shown, end, *closers.behind(text, end, tail))


def _is_simple(message: Message) -> bool:
    """Whether it is plain text or calls: reasoning, also inside the content, is what templates show or cut by rules."""
    if message.role != "assistant":
        return message.content is not None
    return not message.reasoning_content and "think>" not in (message.content or "")


def _is_between_questions(row: Conversation, index: int) -> bool:
    """Whether the answer stands as it does in the conversation that habits are learned from."""
    return index > 0 and row.messages[index - 1].role == row.messages[index + 1].role == "user"


def _end_of_content(text: str, content: str, shown: int, behind: str) -> int | None:
    """Where the content, as it is or with white space trimmed, ends in `text` if `behind` follows it."""
    for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = shown + len(candidate)
        if text.startswith(candidate, shown) and text.startswith(behind, end):
            return end
    return None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a template puts around the words of plain messages in certain roles.

    pieces: the text before, between and behind the messages' words. turns: (wanted message, how much of the piece
    before its words is trained as well, what follows it where it is the last). notes: what holds for every such row.
    """

    form: Form
    pieces: tuple[str, ...]
    turns: tuple[tuple[Wanted, int, str], ...]
    notes: tuple[str, ...]

    def places(self, text: str, words: Sequence[str], closers: Closers) -> list[Place] | None:
        """Where the wanted messages lie in `text`; None unless it is exactly these words between the pieces."""
        starts, ends, at = [], [], len(self.pieces[0])
        if not text.startswith(self.pieces[0]):
            return None
        for said, behind in zip(words, self.pieces[1:], strict=True):
            end = _end_of_content(text, said, at, behind)
            if end is None:
                return None
            starts.append(at)
            ends.append(end)
            at = end + len(behind)
        if at != len(text):
            return None
        found = []
        for each, lead, tail in self.turns:
            shown, end = starts[each.index], ends[each.index]
            closed = closers.behind(text, end, tail) if each.is_answer else close_other(text, end, tail, closers)
            found.append(Place(shown - lead, shown, end, *closed))
        return found


def plain_words(row: Conversation, special: re.Pattern[str] | None) -> list[str] | None:
    """The text of each message; None where a row says more to a template than that, or writes a special token."""
    words = [message.content for message in row.messages if type(message.content) is str]
    if row.tools or len(words) < len(row.messages) or not all(map(_is_plain, row.messages)):
        return None
    together = "\n".join(words)
    if half_character(together) or (special and special.search(together)):
        return None
    return words


def _is_plain(message: Message) -> bool:
    bare = not (message.tool_calls or message.reasoning_content or message.name or message.tool_call_id)
    return bare and _is_simple(message)


def learn_shape(
    stage: Stage, row: Conversation, wanted: Sequence[Wanted], habits: Habits | None, notes: tuple[str, ...]
) -> Shape | None:
    """The shape of rows like this one, which has only plain messages; None where more than words decides its text."""
    everything = range(len(row.messages))
    swapped = stage.with_sentinels(everything, len(row.messages))
    if swapped is None or habits is None:
        return None
    pieces = swapped.split(stage.sentinel)
    turns = []
    for each in wanted:
        index, tail = each.index, habits.tails.get(row.messages[each.index].role)
        if tail is None or not (each.index == 0 or not each.is_answer or row.messages[index - 1].role == "user"):
            return None
        is_last = not each.is_answer or index == len(row.messages) - 1
        if not (is_last or habits.steady or _is_between_questions(row, index)):
            return None
        lead = _lead(pieces[index], habits) if each.is_answer else 0
        if lead is None:
            return None
        turns.append((each, lead, tail))
    return Shape(stage.form, tuple(pieces), tuple(turns), notes)


def _lead(before: str, habits: Habits) -> int | None:
    """How much of the text before an answer's words is trained; None where no header of an answer ends it."""
    if before.endswith(habits.header + habits.opening):
        return len(habits.opening)
    return 0 if habits.header and before.endswith(habits.header) else None
