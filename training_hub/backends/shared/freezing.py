"""Weights that stay as they are, and those that begin to train later: a pure function of recipe, model and step.

Of a model only the names of its weights are known here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from training_hub.errors import RecipeError
from training_hub.recipe.freezing import Freezing


@dataclass(frozen=True)
class Parts:
    """What freezing tells apart of a model: its weights, each called by one key.

    names: every name that a weight goes by, with its key; a head that shares the table of embeddings has two. blocks:
    the keys of each, the lowest first; none where they are not known. tables: keys of those of tokens and positions.
    model: what the model is called in errors.
    """

    names: Sequence[tuple[str, str]]
    blocks: Sequence[Collection[str]]
    tables: Collection[str]
    model: str


def frozen_keys(parts: Parts, settings: Freezing) -> set[str]:
    """The weights that stay as they are for the whole run.

    Raises RecipeError where a setting matches nothing, or leaves nothing that trains.
    """
    problems = [*_block_problems(parts, settings), *_name_problems(parts, settings)]
    if problems:
        raise RecipeError(problems)
    found = {key for block in parts.blocks[: settings.blocks] for key in block}
    if settings.embeddings:
        found |= set(parts.tables)
    patterns = settings.weights or ()
    found |= {key for name, key in parts.names if any(is_part(pattern, name) for pattern in patterns)}
    if all(key in found for _, key in parts.names):
        raise RecipeError("freezing: nothing is left that trains. Write a smaller freezing.blocks, or less to freeze.")
    return found


def is_part(pattern: str, name: str) -> bool:
    """Whether the dotted parts of `pattern` stand side by side among those of `name`; layers.1 is not in layers.10."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[start : start + len(wanted)], wanted)) for start in starts)


@dataclass(frozen=True)
class Turns:
    """What is unfrozen in turn: blocks from the top down, then the embeddings; by name, with the keys of each.

    interval: steps after which the next begins; None where nothing ever changes.
    """

    turns: tuple[tuple[str, tuple[str, ...]], ...] = ()
    interval: int | None = None

    @staticmethod
    def of(parts: Parts, settings: Freezing, frozen: Collection[str]) -> Turns:
        """The turns of a run in which the weights `frozen` stay as they are throughout."""
        if settings.unfreeze_interval is None:
            return Turns()
        blocks = parts.blocks[: max(0, len(parts.blocks) - settings.unfrozen_blocks)]
        named = [(f"block {number}", keys) for number, keys in reversed(list(enumerate(blocks)))]
        moving = [
            (name, tuple(key for key in keys if key not in frozen))
            for name, keys in (*named, ("embeddings", parts.tables))
        ]
        return Turns(tuple((name, keys) for name, keys in moving if keys), settings.unfreeze_interval)

    def count(self, step: int) -> int:
        """How many of the turns have begun in step `step` (from 1)."""
        return len(self.turns) if self.interval is None else min(len(self.turns), (step - 1) // self.interval)

    def waiting(self, step: int) -> frozenset[str]:
        """The weights whose turn has not come in step `step`."""
        return frozenset(key for _, keys in self.turns[self.count(step) :] for key in keys)

    def told(self, step: int) -> str:
        """What a run says where a turn begins."""
        count = self.count(step)
        begun = ", ".join(name for name, _ in self.turns[:count]) or "none yet"
        return (
            f"freezing: from step {step} on these train that were frozen: {begun} ({len(self.turns) - count} to come)"
        )


def _block_problems(parts: Parts, settings: Freezing) -> Iterator[str]:
    there = len(parts.blocks)
    for setting in ("blocks", "unfreeze_interval"):
        if getattr(settings, setting) and not there:
            yield (
                f"freezing.{setting}: the blocks of {parts.model} are not known to transformers as such. Name weights "
                "instead: freezing.weights."
            )
    if settings.blocks > there > 0:
        yield f"freezing.blocks: found {settings.blocks}; the model has {there}. Write freezing.blocks: {there}."
    if settings.unfreeze_interval and settings.unfrozen_blocks >= there > 0:
        yield (
            f"freezing.unfrozen_blocks: found {settings.unfrozen_blocks}; the model has {there} blocks, so that none "
            f"would be unfrozen later. Write freezing.unfrozen_blocks: {there - 1}, or leave unfreeze_interval out."
        )


def _name_problems(parts: Parts, settings: Freezing) -> Iterator[str]:
    names = [name for name, _ in parts.names]
    for pattern in settings.weights or ():
        if not any(is_part(pattern, name) for name in names):
            yield (
                f"freezing.weights: {pattern!r} is in none of the names of the model's {len(names)} weights, such as "
                f"{names[0]} and {names[-1]}."
            )
