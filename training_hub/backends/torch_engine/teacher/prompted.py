"""Prompt distillation: the teacher reads each row behind another system message; the trained tokens are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from training_hub.backends import Given
from training_hub.data.packing import pack
from training_hub.data.prepare import prepare
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError, RecipeError
from training_hub.recipe import Recipe
from training_hub.types import Console, Pack, Progress

UNBOUNDED = 2**31 - 1
SHOWN = 5  # rows in the error about trained tokens that are not the same


@dataclass(frozen=True, eq=False)
class Prompted:
    """The samples that the teacher reads, and which of them, `twins` [n], stands for each of the student's."""

    store: TokenStore
    twins: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that the teacher reads in place of each of the student's samples."""
        lengths: np.ndarray = self.store.lengths[self.twins]
        return lengths

    def pack(self, theirs: Pack) -> Pack:
        """What the teacher reads in place of a pack of the student's; as many tokens of it are trained, in order."""
        return pack([self.store[int(self.twins[sample])] for sample in theirs.samples], theirs.samples.tolist())


class _Whisper:
    """A console that shows progress and says nothing: the rows were told of when the student's were read."""

    def __init__(self, console: Console):
        self._console = console

    @property
    def progress(self) -> Progress:
        return self._console.progress

    def say(self, line: str) -> None:
        pass


def prompted_rows(
    recipe: Recipe,
    given: Given,
    tokenizer: ChatTokenizer,
    template: ChatTemplate | None,
    store: TokenStore,
    console: Console,
) -> Prompted:
    """The rows of the run with distillation.prompt as their system message, each beside its sample in `store`.

    Raises DataError naming the rows whose trained tokens are then not exactly the same.
    """
    if given.rows is not None and iter(given.rows) is given.rows:
        raise RecipeError(
            "distillation.prompt: the rows are handed over as an iterator, which can be read only once, and they are "
            "read a second time with the prompt. Hand over a list."
        )
    whole: dict[str, Any] = {"validation": None, "validation_fraction": 0.0, "deduplicate": False}
    data = recipe.data.model_copy(update=whole)
    training = recipe.training.model_copy(update={"max_seq_len": UNBOUNDED, "max_tokens_per_gpu": None})
    recipe = recipe.model_copy(update={"data": data, "training": training})
    made = prepare(
        recipe,
        tokenizer=tokenizer,
        template=template,
        console=_Whisper(console),
        rows=given.rows,
        system=recipe.distillation.prompt,
    ).train
    return Prompted(made, twins_of(store, made, console))


def twins_of(store: TokenStore, other: TokenStore, console: Console) -> np.ndarray:
    """[n] int64: for each sample of `store`, the one of `other` of the same row that has the same trained tokens.

    Raises DataError naming rows that have none.
    """
    found, problems = np.empty(len(store), np.int64), []
    first, behind = _ranges(store, other)
    with console.progress("comparing trained tokens", len(store), "samples") as advance:
        for index in range(len(store)):
            wanted = _trained(store, index)
            candidates = range(int(first[index]), int(behind[index]))
            twin = next((each for each in candidates if _trained(other, each) == wanted), None)
            if twin is None:
                problems.append(
                    f"{store.origin(index)}: with distillation.prompt {_difference(wanted, candidates, other)}"
                )
            found[index] = -1 if twin is None else twin
            advance(1)
    if problems:
        rest = [f"and {len(problems) - SHOWN:,} more rows"] if len(problems) > SHOWN else []
        raise DataError(
            [
                *problems[:SHOWN],
                *rest,
                "The teacher must be asked for exactly the tokens that are trained. Leave these rows out, or use a "
                "template that shows a system message without changing the answers.",
            ]
        )
    return found


def _ranges(store: TokenStore, other: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """For each sample of `store`, where the samples of its row begin and end in `other`."""
    rows, theirs = (one.column("parts").astype(np.int64) << 40 | one.column("lines") for one in (store, other))
    order = np.argsort(theirs, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        raise DataError("distillation.prompt: rows of a part do not come in order; report this, with the kind of file.")
    return np.searchsorted(theirs, rows, side="left"), np.searchsorted(theirs, rows, side="right")


def _trained(store: TokenStore, index: int) -> tuple[bytes, bytes]:
    sample = store[index]
    places = np.flatnonzero(sample.weights)
    return sample.ids[places].tobytes(), sample.weights[places].tobytes()


def _difference(wanted: tuple[bytes, bytes], candidates: range, other: TokenStore) -> str:
    if not candidates:
        return "the row is not there."
    counts = [len(_trained(other, each)[0]) // 4 for each in candidates]
    return f"its trained tokens are others: {len(wanted[0]) // 4} here, {' or '.join(map(str, counts))} there."
