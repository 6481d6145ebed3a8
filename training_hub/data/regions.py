"""Where in the rendering of a whole conversation each message lies, for any chat template.

Nothing is assumed about the template's syntax. Places are found by asking it: what would you show up to here, what
would you show as prompt, and what changes when this message says something else? A message's text is what differs when
it is replaced by a sentinel that occurs nowhere else; an answer begins where the generation prompt ends; and it is
closed by what the template puts behind it even when it is the last one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from training_hub.data.chat import Form, replaced
from training_hub.errors import DataError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one message is in a text.

    start: first character that is trained. shown: first that belongs to the message. end: behind its last.
    closed: behind the token that ends the turn; equal to `end` where nothing does. stops: a stop token is among it.
    """

    start: int
    shown: int
    end: int
    closed: int
    stops: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer of the conversation: its place, and whether serving would have shown the same up to here.

    `prompted` says whether it is shown behind the whole generation prompt. `alone` is the
    text and place it has as the last turn, None where the template cannot show that.
    """

    place: Place
    steady: bool
    prompted: bool
    alone: tuple[str, Place] | None


@dataclass(frozen=True, slots=True)
class Closers:
    """The tokens that can end a turn: `special` finds any special token, `stops` are those the model stops at."""

    special: re.Pattern[str] | None
    stops: frozenset[str]

    def behind(self, text: str, end: int, tail: str) -> tuple[int, bool]:
        """(end of what closes the turn whose content ends at `end`, whether a stop token is among it).

        `tail` is what the template puts behind a turn when it is the last. A special token directly behind the content
        counts if the model stops at it or if it stands there in `tail` too; otherwise it opens the next turn.
        """
        directly = self.special_at(text, end)
        if directly and directly.group() in self.stops:
            return directly.end(), True
        tail = common_prefix(tail, text[end:])
        sure = self.snap(text, end + len(tail))
        at = end
        closed = end
        while match := self.special_at(text, at):
            if match.group() in self.stops:
                return match.end(), True
            if match.end() > sure:
                break
            at = closed = match.end()
        if closed == end:
            closed = self._text_until_special(text, end, sure)
            if closed > end and self._ends_in_stop(text, closed):
                return closed, True
        elif self.special_at(text, end):
            # Several special tokens and none of them stops: only the first one surely belongs to the turn.
            closed = self.special_at(text, end).end()  # type: ignore[union-attr]
        return closed, False

    def snap(self, text: str, position: int) -> int:
        """`position`, or the start of the special token that it would cut in two."""
        if self.special is None:
            return position
        for match in self.special.finditer(text, max(0, position - 64), position + 64):
            if match.start() < position < match.end():
                return match.start()
        return position

    def special_at(self, text: str, position: int) -> re.Match[str] | None:
        while position < len(text) and text[position].isspace():
            position += 1
        return self.special.match(text, position) if self.special else None

    def stop_in(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)

    def _text_until_special(self, text: str, end: int, sure: int) -> int:
        """The end of closing words such as `</answer>`, with the first special token behind them."""
        found = self.special.search(text, end, sure) if self.special else None
        while found and found.group() not in self.stops:
            following = self.special_at(text, found.end())
            if not following or following.end() > sure:
                break
            found = following
        return found.end() if found else end + len(text[end:sure].rstrip())

    def _ends_in_stop(self, text: str, closed: int) -> bool:
        return any(text.endswith(stop, 0, closed) for stop in self.stops)


class Stage:
    """One conversation and its renderings, each made once and only when asked for."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], render: Render, form: Form):
        self.messages = list(messages)
        self.form = form
        self._render = render
        self._made: dict[tuple[Any, ...], str | DataError] = {}

    @cached_property
    def sentinel(self) -> str:
        return unused(self.full)

    @property
    def full(self) -> str:
        """The conversation as it is; raises the template's DataError."""
        return self._text(("upto", len(self.messages), False), self.messages, False)

    def upto(self, count: int, prompt: bool = False) -> str | None:
        """The first `count` messages, None where the template refuses them."""
        return self._try(("upto", count, prompt), self.messages[:count], prompt)

    def swapped(self, index: int, count: int, keep_calls: bool = False) -> str | None:
        """The first `count` messages with message `index` saying the sentinel; None where refused or not shown."""
        return self.with_sentinels((index,), count, keep_calls)

    def with_sentinels(self, indices: Sequence[int], count: int, keep_calls: bool = False) -> str | None:
        messages = list(self.messages[:count])
        for index in indices:
            messages[index] = replaced(messages[index], self.sentinel, self.form, keep_calls)
        text = self._try(("swapped", tuple(indices), count, keep_calls), messages, False)
        return text if text is not None and text.count(self.sentinel) == len(indices) else None

    def _try(self, key: tuple[Any, ...], messages: Sequence[Mapping[str, Any]], prompt: bool) -> str | None:
        try:
            return self._text(key, messages, prompt)
        except DataError:
            # A part of a conversation can be refused where the whole is not; the caller then goes another way.
            return None

    def _text(self, key: tuple[Any, ...], messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        if key not in self._made:
            try:
                self._made[key] = self._render(messages, prompt)
            except DataError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, DataError):
            raise made
        return made


@dataclass(frozen=True, slots=True)
class Habits:
    """What a template does around any plain turn, learned once from a made-up conversation.

    header: the text that opens an answer, up to where generation starts. opening: what it shows between there and the
    answer's own text (an empty block of thoughts). tails: what follows the last message, by role. steady: an answer
    looks the same when more turns follow. prompted: answers are shown behind the whole generation prompt.
    """

    header: str
    opening: str
    tails: Mapping[str, str]
    steady: bool
    prompted: bool


def learn_habits(render: Render, closers: Closers, form: Form) -> Habits | None:
    """The template's habits, None where the made-up conversation does not show them clearly."""
    roles = ("user", "assistant", "user", "assistant")
    texts = ("\ue010\ue011", "\ue012\ue013", "\ue014\ue015", "\ue016\ue017")
    messages = [replaced({"role": role}, text, form) for role, text in zip(roles, texts, strict=True)]
    stage = Stage(messages, render, form)
    asked, prompt, answered, both = stage.upto(1), stage.upto(1, True), stage.upto(2), stage.upto(4)
    if asked is None or prompt is None or answered is None or both is None:
        return None
    if texts[0] not in asked or texts[1] not in answered:
        return None
    at = answered.index(texts[1])
    start = answer_start(prompt, asked, answered, (at, at), "", closers)
    if not answered.startswith(asked) or start < len(asked):
        return None
    tails = {"user": asked[asked.index(texts[0]) + len(texts[0]) :], "assistant": answered[at + len(texts[1]) :]}
    closed, _ = closers.behind(answered, at + len(texts[1]), tails["assistant"])
    steady = both.startswith(answered[:closed])
    return Habits(answered[len(asked) : start], answered[start:at], tails, steady, answered.startswith(prompt))


def answer_start(
    prompt: str | None, before: str, text: str, place: tuple[int, int], header: str, closers: Closers
) -> int:
    """Where generation starts in `text`, whose answer is shown at `place`: behind the generation prompt.

    A prompt that the text does not repeat to its end (it opens a block of thoughts that the answer does not have)
    counts as far as they agree, but never into the answer. `header` opens answers elsewhere; where it still lies ahead,
    the prompt lacked it, as templates give none for a conversation that begins with an answer.
    """
    shown, end = place
    if prompt is not None and text.startswith(prompt) and len(prompt) <= max(end, shown):
        start = len(prompt)
    else:
        start = closers.snap(text, _start_by_words(prompt, before, text, shown))
    at = text.rfind(header, start, shown) if header else -1
    if at >= 0:
        return at + len(header)
    while start == 0 and (opening := closers.special.match(text) if closers.special else None):
        # A conversation that begins with an answer, and no prompt to tell: the token that begins the text is no answer.
        start = min(opening.end(), shown)
    return start


def _start_by_words(prompt: str | None, before: str, text: str, shown: int) -> int:
    """Behind the words of a generation prompt that differs from the text, in white space or at its end."""
    common = len(common_prefix(before, text))
    if prompt is None or not prompt.startswith(before):
        return min(common, shown)
    agreed = min(len(common_prefix(prompt, text)), shown)
    opened = prompt[len(before) :]
    at = text.rfind(opened.strip(), common, shown) if opened.strip() else -1
    if at < 0:
        return agreed
    behind = at + len(opened.strip())
    blank = opened[len(opened.rstrip()) :]
    return max(agreed, min(behind + len(common_prefix(blank, text[behind:])), shown))


def locate_answer(stage: Stage, index: int, closers: Closers, header: str | None) -> Turn | None:
    """The place of assistant message `index`; None where the template does not tell.

    `header` is the text that opens an answer, used where the conversation up to here cannot be rendered on its own.
    """
    alone = locate_alone(stage, index, closers, header)
    full, prompt = stage.full, stage.upto(index, prompt=True)
    prompted = index == 0 or alone is None or prompt is None or alone[0].startswith(prompt)
    if alone is not None:
        text, place = alone
        if full.startswith(text[: place.closed]):
            closed, stops = closers.behind(full, place.end, text[place.end :])
            return Turn(Place(place.start, place.shown, place.end, closed, stops), True, prompted, alone)
    place_in_full = _among_others(stage, index, closers, alone, header)
    return Turn(place_in_full, False, prompted, alone) if place_in_full else None


def locate_alone(stage: Stage, index: int, closers: Closers, header: str | None) -> tuple[str, Place] | None:
    """The conversation up to and with answer `index`, and the answer's place in it."""
    text, swapped = stage.upto(index + 1), stage.swapped(index, index + 1)
    if text is None or swapped is None:
        return None
    shown, end = difference(text, swapped, closers)
    prompt, before = stage.upto(index, prompt=True), stage.upto(index) or ""
    start = answer_start(prompt, before, text, (shown, end), header or "", closers)
    closed, stops = closers.behind(text, end, text[end:])
    return text, Place(start, min(shown, end), end, closed, stops)


def _among_others(
    stage: Stage, index: int, closers: Closers, alone: tuple[str, Place] | None, header: str | None
) -> Place | None:
    """The place of answer `index` in the whole conversation, where it is not shown as it would be as the last one."""
    full = stage.full
    region = _region(stage, index, closers, alone)
    if region is None:
        return None
    shown, end = region
    opened, lead, tail = header or "", "", ""
    if alone is not None:
        text, place = alone
        before = stage.upto(index) or ""
        opened = text[len(before) : place.start] if text.startswith(before) else opened
        lead, tail = text[place.start : place.shown], text[place.end :]
    start = shown - len(lead) if lead and full[:shown].endswith(lead) else shown
    for opening in filter(None, (opened, header)):
        at = full.rfind(opening, 0, shown)
        if at >= 0 and not closers.stop_in(full[at + len(opening) : shown]):
            start = at + len(opening)
            break
    closed, stops = closers.behind(full, end, tail)
    return Place(min(start, shown), shown, end, closed, stops)


def _region(stage: Stage, index: int, closers: Closers, alone: tuple[str, Place] | None) -> tuple[int, int] | None:
    """What of the whole conversation belongs to message `index` alone."""
    full, count = stage.full, len(stage.messages)
    swapped = stage.swapped(index, count)
    own = alone[0][alone[1].shown : alone[1].end] if alone else None
    if swapped is not None:
        shown, end = difference(full, swapped, closers)
        # As the last turn it may show more at its front (reasoning) but ends alike. If the ends disagree, messages
        # behind it changed as well (a tool's answer that is shown by the name of the call), and the region is too wide.
        if own is None or own.endswith(full[shown:end]):
            return shown, end
        if full[shown:end].endswith(own):
            return end - len(own), end
    if own and full.count(own) == 1:
        return full.index(own), full.index(own) + len(own)
    return None


def locate_other(stage: Stage, index: int, closers: Closers) -> Place | None:
    """The place of a message that no generation prompt opens: its content, and the special token that closes it."""
    full, swapped = stage.full, stage.swapped(index, len(stage.messages), keep_calls=True)
    if swapped is None:
        return None
    shown, end = difference(full, swapped, closers)
    text, alone = stage.upto(index + 1), stage.swapped(index, index + 1, keep_calls=True)
    tail = text[difference(text, alone, closers)[1] :] if text is not None and alone is not None else ""
    closed, stops = close_other(full, end, tail, closers)
    return Place(shown, shown, end, closed, stops)


def close_other(text: str, end: int, tail: str, closers: Closers) -> tuple[int, bool]:
    """As `Closers.behind`, for turns that are not answers: one special token that is theirs, or nothing."""
    sure = end + len(common_prefix(tail, text[end:]))
    match = closers.special_at(text, end)
    if match is None or match.end() > sure:
        return end, False
    return match.end(), match.group() in closers.stops


def difference(text: str, swapped: str, closers: Closers) -> tuple[int, int]:
    """The part of `text` that is not in `swapped`: between the longest common beginning and end, on token borders."""
    start = closers.snap(text, len(common_prefix(text, swapped)))
    rest = common_suffix(text[start:], swapped[min(start, len(swapped)) :])
    return start, max(start, closers.snap(text, len(text) - rest))


def common_prefix(first: str, second: str) -> str:
    """The longest beginning that both share."""
    # By halves: comparing slices is one memory comparison each, a loop over characters is a hundred times slower.
    low, high = 0, min(len(first), len(second)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return first[:low]


def common_suffix(first: str, second: str) -> int:
    """The length of the longest end that both share."""
    return len(common_prefix(first[::-1], second[::-1]))


def unused(text: str) -> str:
    """A short text that is not in `text`, whose first and last characters are not in it either."""
    free = list(itertools.islice((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text), 2))
    if len(free) < 2:
        raise DataError("the conversation uses every private-use character of Unicode; no place is left for a marker.")
    return free[0] + free[1]
