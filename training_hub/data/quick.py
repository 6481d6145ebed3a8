"""The quick way to place all trained turns of a row: one more rendering instead of several for each turn.

It settles plain text and tool calls, and hands everything else back. Where it settles a row, the careful way of
regions.py finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    if not with_calls and (habits.steady or _is_between_questions(row, each.index)):
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
    if before.endswith(habits.header + habits.opening):
        start = shown - len(habits.opening)
    elif habits.header and before.endswith(habits.header):
        start = shown
    else:
        return None
    return Place(start, shown, end, *closers.behind(text, end, tail))


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
