"""What one rendering of a chat template may use: processor time, and characters it makes.

Jinja's sandbox keeps a template from reaching out, not from working or growing without end. Every operation of a
template that can do either is charged here (sandbox.py says where): before it runs where a small call can make much,
after it where it cannot. Nothing is measured until the first hundred thousand steps are spent, so an ordinary
conversation pays a subtraction per operation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

SECONDS = 1.2
"""Processor time of the rendering thread."""
CHARACTERS = 32_000_000
"""Characters that a template may make for one rendering: all texts and lists, also those it throws away."""
PER_CHARACTER = 32
"""What each character of a conversation adds to that, so that a long one is not refused for its length."""
LONGEST_SOURCE = 256_000
"""Characters of a template's source. The longest of 71 published ones has 20,000."""

_STEPS_PER_LOOK = 100_000
_CHARACTERS_PER_LOOK = 1_000_000
# What a Python object takes besides its characters, in bytes; a place in a list or dictionary with the object in it.
OBJECT = 50
ITEM = 32
# The price of a bit of a number made by * or **, whose time grows faster than its length.
_DIGITS = 64


class Overrun(Exception):
    """A template has used what it may."""


class Budget:
    """What is left for the template that is being rendered. One thread's: nothing here is locked."""

    __slots__ = ("_conversation", "_reserve", "_until", "characters", "steps")

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, conversation: Any) -> None:
        """Start anew. The size of `conversation` is only looked at if the template makes much."""
        self.steps = _STEPS_PER_LOOK
        self.characters = _CHARACTERS_PER_LOOK
        self._reserve = CHARACTERS - _CHARACTERS_PER_LOOK
        self._conversation = conversation
        self._until: float | None = None

    def work(self, steps: int) -> None:
        """Charge for time; a step is about a tenth of a microsecond."""
        self.steps -= steps
        if self.steps < 0:
            self._look()

    def make(self, size: int) -> None:
        """Charge for memory: `size` characters, or bytes."""
        self.characters -= size + OBJECT
        if self.characters < 0:
            self.draw()

    def draw(self) -> None:
        """Take more characters from the reserve, as long as it lasts."""
        self._look()
        if self.characters + self._reserve < 0:
            self._reserve += self._grant()
            self._conversation = None
        if self.characters + self._reserve < 0:
            raise Overrun(
                f"stopped: it makes more text than the limit of {CHARACTERS:,} characters, and {PER_CHARACTER} for "
                "each of the conversation, for one rendering"
            )
        share = min(_CHARACTERS_PER_LOOK - self.characters, self._reserve)
        self.characters += share
        self._reserve -= share

    def weigh(self, value: Any) -> int:
        """The characters that `value` takes when it is written out. Raises Overrun where that is more than is left."""
        if isinstance(value, str):
            return len(value)
        left = self.characters + self._reserve
        size = weigh(value, left)
        if size > left and self._conversation is not None:
            size = weigh(value, left + self._grant())
        self.work(size // ITEM)
        if size > left + self._grant():
            self.make(size)
        return size

    def made(self, value: Any) -> Any:
        """`value`, charged for what it holds; one that makes its items one by one is charged as it does."""
        if isinstance(value, str | bytes):
            self.make(len(value))
        elif isinstance(value, list | tuple | dict):
            # What a template builds out of containers is weighed as it is built, so that none can grow beyond the limit
            # by holding another one many times.
            self.make(self.weigh(value))
        elif isinstance(value, Iterator):
            return self._one_by_one(value, OBJECT, 1)
        else:
            self.work(2)
        return value

    def cut(self, value: Any) -> Any:
        """A part of `value` that holds nothing new."""
        self.make(len(value) if isinstance(value, str | bytes) else ITEM * len(value))
        return value

    def counted(self, items: Any, steps: int, outputs: int) -> Any:
        """`items`, to be gone through at `steps` for each, with places for so many pieces of text."""
        try:
            times = len(items)
        except TypeError:
            return self._one_by_one(items, steps, outputs)
        self.work(steps * times)
        self.make(8 * outputs * times)
        return items

    def _one_by_one(self, items: Any, steps: int, outputs: int) -> Any:
        for item in items:
            self.work(steps)
            self.make(8 * outputs)
            yield item

    def _look(self) -> None:
        self.steps = _STEPS_PER_LOOK
        now = time.thread_time()
        if self._until is None:
            self._until = now + SECONDS
        elif now > self._until:
            raise Overrun(f"stopped: it takes longer than the limit of {SECONDS} seconds for one rendering")

    def _grant(self) -> int:
        return PER_CHARACTER * weigh(self._conversation, 1 << 40) if self._conversation is not None else 0


def weigh(value: Any, limit: int) -> int:
    """The characters `value` takes when it is written out, what it holds twice counted twice; some number above `limit`
    where it is more than that. Lists of lists of the same lists are how a short template writes a long text.
    """
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            total += ITEM * len(item)
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | range | Set | ValuesView):
            total += ITEM * len(item)
            waiting.extend(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
    return total


def product(budget: Budget, left: Any, right: Any) -> int:
    """What `left * right` makes."""
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
            return max(times, 0) * len(value) * (1 if isinstance(value, str | bytes) else ITEM)
    if isinstance(left, int) and isinstance(right, int):
        return _DIGITS * (left.bit_length() + right.bit_length())
    return 0


def power(budget: Budget, left: Any, right: Any) -> int:
    """What `left ** right` makes."""
    return _DIGITS * left.bit_length() * max(right, 0) if isinstance(left, int) and isinstance(right, int) else 0


def percent(budget: Budget, text: Any, arguments: Sequence[Any]) -> int:
    """What `text % arguments` makes; nothing where `text` is a number."""
    if not isinstance(text, str):
        return 0
    flat = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else arguments
    return len(text) + widths(text) + text.count("*") * _numbers(flat) + text.count("%") * budget.weigh(list(arguments))


def widths(text: str) -> int:
    """The sum of the numbers in a format."""
    return sum(int(digits[:12]) for digits in re.findall(r"\d+", text))


Estimate = Callable[[Budget, Any, Sequence[Any]], int]


def added(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """What a call makes at most whose arguments say how long the text becomes."""
    return budget.weigh(value) + _arguments(budget, arguments)


def multiplied(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """The same where every character or item of the value can become as long as the arguments together."""
    return (budget.weigh(value) + 1) * (1 + _arguments(budget, arguments))


def slow(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """The same for work that is done word by word in Python."""
    return 32 * multiplied(budget, value, arguments)


def pieces(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """What a call makes that gives an object for each character of a text."""
    return (32 * len(value) if isinstance(value, str) else 0) + ITEM * _numbers(arguments)


def indented(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """What `value | tojson(...)` makes beside the text of the value itself."""
    return budget.weigh(value) * _arguments(budget, arguments) if arguments else 0


def split(budget: Budget, text: Any, arguments: Sequence[Any]) -> int:
    """What `text.split(...)` makes; without a separator, at most a word for every two characters."""
    separator = arguments[0] if arguments else None
    parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    return len(text) + OBJECT * parts


def replaced(budget: Budget, text: Any, arguments: Sequence[Any]) -> int:
    """What `text.replace(old, new)` makes."""
    if not isinstance(text, str) or len(arguments) < 2 or not all(isinstance(part, str) for part in arguments[:2]):
        return multiplied(budget, text, arguments)
    return len(text) + text.count(arguments[0]) * len(arguments[1])


def joined(budget: Budget, separator: Any, arguments: Sequence[Any]) -> int:
    """What `separator.join(items)` makes."""
    return budget.weigh(arguments[0]) * (1 + len(separator)) if arguments else 0


def summed(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """What `value | sum` makes; of lists it makes each part of the sum anew."""
    size = budget.weigh(value)
    return size * size // ITEM if any(isinstance(each, list | tuple) for each in value) else slow(budget, value, ())


def searched(budget: Budget, value: Any, arguments: Sequence[Any]) -> int:
    """The price of comparing every item of a list with something."""
    return len(value) * sum(budget.weigh(argument) for argument in arguments) // 64


def _numbers(arguments: Sequence[Any]) -> int:
    return sum(abs(each) for each in arguments if isinstance(each, int) and not isinstance(each, bool))


def _arguments(budget: Budget, arguments: Sequence[Any]) -> int:
    return _numbers(arguments) + sum(budget.weigh(each) for each in arguments if not isinstance(each, int))
