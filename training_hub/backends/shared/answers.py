"""What is asked of a model and what it says, and how many are asked at once, whichever engine asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TOKENS_AT_ONCE = 16384
"""Of prompts and answers together, padding included."""

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Prompt:
    """Token ids of what is asked, and the most tokens that the answer may have."""

    ids: Sequence[int]
    limit: int


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the likeliest each time, or drawn where temperature is not 0.

    top_p: drawn among the likeliest tokens that hold this share together. stop_ids: what ends an answer.
    """

    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Token ids without the one that ended it; "stop" where one did, "length" where the limit cut it."""

    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def cut(ids: Sequence[int], decoding: Decoding) -> Answer:
    """The answer that these tokens hold."""
    end = next((place for place, token in enumerate(ids) if token in decoding.stop_ids), None)
    return Answer(tuple(ids), "length") if end is None else Answer(tuple(ids[:end]), "stop")


def batches(
    prompts: Sequence[Prompt], tokens_at_once: int, is_padded: bool = True, merges: bool = True
) -> Iterator[list[list[int]]]:
    """The numbers of the prompts in groups; equal prompts stand together, as one row, where `merges`.

    Shortest limits first, then shortest prompts. Not padded: only prompts of one length share a group.
    """
    rows: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rows.setdefault((tuple(prompt.ids), prompt.limit) if merges else number, []).append(number)
    group: list[list[int]] = []
    width = limit = 0
    for places in sorted(rows.values(), key=lambda row: (prompts[row[0]].limit, len(prompts[row[0]].ids), row[0])):
        one = prompts[places[0]]
        wider, longer = max(width, len(one.ids)), max(limit, one.limit)
        is_full = (wider + longer) * (len(group) + 1) > tokens_at_once
        if group and (is_full or (not is_padded and len(one.ids) != width)):
            yield group
            group, wider, longer = [], len(one.ids), one.limit
        group.append(places)
        width, limit = wider, longer
    if group:
        yield group
