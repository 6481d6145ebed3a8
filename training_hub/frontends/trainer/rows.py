"""The rows of a trainer: what is in their columns, and what `formatting_func` and `data_collator` make of them.

The first row is looked at, so that a column that is not there, or a function that does not fit, is said at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from training_hub.data.sources import open_object, open_path, plain
from training_hub.errors import DataError, HubError, RecipeError
from training_hub.frontends.rows import ROWS_AT_ONCE, columns_of, dictionaries, first_row, of_column
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown

Row = Mapping[str, Any]
TOKENS = "input_ids"


@dataclass(frozen=True)
class RowSettings:
    """What a configuration and a trainer say of the rows. at_once: rows that a batched formatting_func is given."""

    text_field: str | None = None
    dropped: Sequence[str] = ()
    formatting_func: Callable[[Any], Any] | None = None
    data_collator: Callable[[Any], Any] | None = None
    at_once: int = ROWS_AT_ONCE


@dataclass(frozen=True)
class Found:
    """Settings that name the rows and how their columns are read, and live rows if there are any."""

    settings: dict[str, Any] = field(default_factory=dict)
    live: Any = None
    is_conversation: bool | None = None


def rows_of(rows: Any, asked: RowSettings, name: str = "train_dataset", path: str = "data.path") -> Found:
    """What `rows` are: a path or hub name for the setting `path`, or rows in memory.

    Raises DataError or RecipeError.
    """
    if isinstance(rows, str | os.PathLike):
        functions = [one for one in ("formatting_func", "data_collator") if getattr(asked, one) is not None]
        if functions or asked.dropped:
            raise RecipeError(
                f"{name}: {', '.join(functions or ['ids_to_pop_from_dataset'])} needs rows in memory, and {rows} is "
                "the name of some. Hand over load_dataset(...) or a list."
            )
        found = _columns(first_row(open_path(os.fspath(rows))), asked, name)
        return replace(found, settings={path: os.fspath(rows), **found.settings})
    if isinstance(rows, Mapping) or not hasattr(rows, "__iter__"):
        raise RecipeError(
            f"{name}: found a {type(rows).__name__}; allowed: a `datasets` object, a DataFrame, a list of "
            "dictionaries, or the name of a file. Of several splits hand over one."
        )
    if asked.dropped or asked.formatting_func is not None or asked.data_collator is not None:
        rows = _made(rows, asked, name)
    if iter(rows) is rows:  # what is looked at would be gone
        begin = list(islice(rows, 1))
        rows = chain(begin, rows)
        first = first_row(open_object(begin))
    else:
        first = first_row(open_object(rows))
    return replace(_columns(first, asked, name), live=rows)


def _columns(row: Row | None, asked: RowSettings, name: str) -> Found:
    """How the columns of the rows are read. Raises DataError for a named one that is not there."""
    if row is None or asked.formatting_func is not None or asked.data_collator is not None:
        return Found()
    column = asked.text_field
    if column is None or TOKENS in row:
        return Found(is_conversation=_is_conversation(row))
    if column not in row:
        near = nearest(column, list(row))
        hint = f" Did you mean {near}?" if near else ""
        raise DataError(
            f"dataset_text_field: no column {column!r} in the first row of {name}, which has "
            f"{', '.join(map(repr, row))}.{hint} Without it the columns of a row tell what is trained."
        )
    found, is_plain = of_column(column, row[column])
    return Found(found, None, not is_plain)


def _is_conversation(row: Row) -> bool | None:
    from training_hub.data.formats import detect
    from training_hub.types import Origin

    try:
        format_name = detect(row, Origin("the first row", 1, "row")).name
    except DataError:
        return None  # the run says what is wrong with it
    if format_name == "prompt_completion":
        return not isinstance(row["completion"], str)
    return format_name in ("messages", "sharegpt", "instruction")


def _made(rows: Any, asked: RowSettings, name: str) -> Iterable[Row]:
    """The rows without columns that are dropped, as formatting_func and data_collator make them."""
    made: Iterable[Row] = Dropped(rows, tuple(asked.dropped)) if asked.dropped else dictionaries(rows)
    if asked.formatting_func is not None:
        made = formatted(made, asked.formatting_func, name, asked.at_once)
    if asked.data_collator is not None:
        return Collated(made, asked.data_collator, name)
    return made


@dataclass(frozen=True)
class Dropped:
    """Rows without some of their columns."""

    rows: Any
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[Row]:
        for row in dictionaries(self.rows):
            yield {name: value for name, value in row.items() if name not in self.names}


def formatted(rows: Iterable[Row], function: Callable[[Any], Any], name: str, at_once: int) -> Iterable[Row]:
    """The rows that `function` makes of `rows`. Raises DataError where it fails on the first of them.

    A function of one row gives a text, several, or a row; one of many rows, given as columns, gives a text for each.
    Which of the two it is, is found by asking: a function of many rows answers two rows with two texts and three with
    three.
    """
    first = next(iter(rows), None)
    if first is None:
        return ()
    try:
        answer: Any = function(first)
    except Exception as error:
        if not _takes_columns(function, first):
            raise _failed(error, name, 1) from error
        return FormattedBatches(rows, function, name, at_once)
    if not isinstance(answer, str | Mapping) and _takes_columns(function, first):
        return FormattedBatches(rows, function, name, at_once)
    _rows_from(answer, name, 1)
    return Formatted(rows, function, name)


def _takes_columns(function: Callable[[Any], Any], first: Row) -> bool:
    """Whether the function answers two rows, given as columns, with two texts and three with three."""
    for count in (2, 3):
        try:
            answer = function(columns_of([first] * count))
        except Exception:  # a function of one row may do anything with columns
            return False
        if not isinstance(answer, list | tuple) or len(answer) != count or not all(isinstance(t, str) for t in answer):
            return False
    return True


@dataclass(frozen=True)
class Formatted:
    """Rows made by a function of one row."""

    rows: Iterable[Row]
    function: Callable[[Any], Any]
    name: str

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.rows, 1):
            try:
                answer = self.function(row)
            except Exception as error:
                raise _failed(error, self.name, number) from error
            yield from _rows_from(answer, self.name, number)


@dataclass(frozen=True)
class FormattedBatches:
    """Rows made by a function of many rows, which are given as columns."""

    rows: Iterable[Row]
    function: Callable[[Any], Any]
    name: str
    at_once: int

    def __iter__(self) -> Iterator[Row]:
        seen, rows = 0, iter(self.rows)
        while batch := list(islice(rows, self.at_once)):
            try:
                texts = self.function(columns_of(batch))
            except Exception as error:
                raise _failed(error, self.name, seen + 1) from error
            if not isinstance(texts, list | tuple) or len(texts) != len(batch):
                raise DataError(
                    f"formatting_func: gave {shown(texts)} for {len(batch)} rows from row {seen + 1} of {self.name} "
                    "on; allowed: a list with a text for each."
                )
            for number, text in enumerate(texts, seen + 1):
                yield from _rows_from(text, self.name, number)
            seen += len(batch)


def _rows_from(answer: Any, name: str, number: int) -> list[Row]:
    """The rows that an answer of formatting_func stands for."""
    several = answer if isinstance(answer, list | tuple) else [answer]
    if several and all(isinstance(one, str | Mapping) for one in several):
        return [one if isinstance(one, Mapping) else {"text": one} for one in several]
    raise DataError(
        f"formatting_func: gave {shown(answer)} for row {number} of {name}; allowed: a text, a list of texts, or a "
        "dictionary of columns."
    )


def _failed(error: Exception, name: str, number: int) -> HubError:
    if isinstance(error, HubError):
        return error
    return DataError(f"formatting_func: raised {type(error).__name__} for row {number} of {name}: {error}")


@dataclass(frozen=True)
class Collated:
    """Rows of token ids as a collator labels them, each given to it by itself, since padding and packing are ours."""

    rows: Iterable[Row]
    collator: Callable[[Any], Any]
    name: str

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.rows, 1):
            if TOKENS not in row:
                raise RecipeError(
                    f"data_collator: a collator labels token ids, and row {number} of {self.name} has the columns "
                    f"{', '.join(map(repr, row))}. Hand over rows with input_ids, or leave it out: rows are masked, "
                    "packed and batched here."
                )
            made = plain(dict(self.collator([row])))
            yield {key: made[key][0] for key in (TOKENS, "labels", "attention_mask") if key in made}
