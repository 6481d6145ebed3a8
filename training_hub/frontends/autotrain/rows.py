"""Which rows AutoTrain's parameters mean: files of a folder by split, and what is in the column that is named.

The first row is looked at, so that a column that is not there is said at once and messages are told from text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from training_hub.data.files import kind_by_name
from training_hub.data.formats import detect
from training_hub.data.sources import open_object, open_path
from training_hub.errors import DataError, RecipeError
from training_hub.frontends.autotrain.params import LLMTrainingParams
from training_hub.frontends.dialects import is_live
from training_hub.frontends.rows import first_row, named, of_column
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown
from training_hub.types import Origin

TRAIN = LLMTrainingParams.model_fields["train_split"].default
PLAIN = ("text", "prompt_completion", "tokens")
"""Formats that no template touches."""


@dataclass(frozen=True)
class Rows:
    """Settings that name the rows, and live rows if there are any.

    is_plain_text: whether no template touches the rows; None where that is not known.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    live: Any = None
    is_plain_text: bool | None = None
    notes: tuple[str, ...] = ()


def rows_of(params: LLMTrainingParams, write: Any = str, rows: Any = None) -> Rows:
    """What `params` say of the rows, or of live `rows`. Raises RecipeError or DataError."""
    given = params.data_path if rows is None else rows
    if given is None:
        return Rows()  # the recipe asks for it
    if params.valid_split is not None and params.valid_path is not None:
        raise RecipeError(f"{write('valid_split')} and {write('valid_path')}: one excludes the other. Leave one out.")
    if is_live(given):
        _refuse_splits(params, write, "rows in memory have")
        if iter(given) is given:  # what is looked at would be gone
            first = list(islice(given, 1))
            given = chain(first, given)
            found = _columns(params, write, first_row(open_object(first)))
        else:
            found = _columns(params, write, first_row(open_object(given)))
        return Rows(found.settings, given, found.is_plain_text)
    if not isinstance(given, str):
        raise RecipeError(
            f"{write('data_path')}: found {shown(given)}; allowed: a file, a folder, a hub name, or rows in memory."
        )
    files = _files(params, write, given)
    found = _columns(params, write, first_row(open_path(files["data.path"], files.get("data.split", "train"))))
    return Rows({**files, **found.settings}, None, found.is_plain_text, found.notes)


def _files(params: LLMTrainingParams, write: Any, given: str) -> dict[str, Any]:
    """data.path, data.split and data.validation for a path or hub name."""
    path = Path(given).expanduser()
    if path.is_file():
        _refuse_splits(params, write, f"{given} is one file and has")
        return {"data.path": given}
    if not path.is_dir():
        if params.valid_split is None:
            return {"data.path": given, "data.split": params.train_split}
        return {
            "data.path": given,
            "data.split": params.train_split,
            "data.validation": f"{given}[{params.valid_split}]",
        }
    if params.project_name and _is_inside(Path(params.project_name), path):
        raise RecipeError(
            f"{write('project_name')}: {params.project_name} lies in {given}, where the rows are; what a run writes "
            "would be read as rows by the next. Name another folder, or the file of rows."
        )
    is_named = "train_split" in params.model_fields_set
    found = {"data.path": _of_split(path, params.train_split, write("train_split"), is_needed=is_named)}
    if params.valid_split is not None:
        found["data.validation"] = _of_split(path, params.valid_split, write("valid_split"), is_needed=True)
    return {name: str(file) for name, file in found.items()}


def _refuse_splits(params: LLMTrainingParams, write: Any, what: str) -> None:
    """Raise RecipeError where a split is asked for of what has none."""
    if params.valid_split is not None:
        raise RecipeError(f"{write('valid_split')}: {what} no splits. Give a file: {write('valid_path')} FILE.")
    if params.train_split != TRAIN:
        raise RecipeError(f"{write('train_split')}: {what} no splits. Leave it out.")


def _of_split(folder: Path, split: str, name: str, *, is_needed: bool) -> Path:
    """The file of a folder that is called after a split; the folder where there is none and none is needed."""
    there = sorted(file for file in folder.iterdir() if file.is_file() and kind_by_name(file) is not None)
    named = [file for file in there if file.name.split(".")[0] == split]
    if len(named) > 1:
        both = ", ".join(file.name for file in named)
        raise RecipeError(f"{name}: {folder} holds {both}. Name one as the path of the data.")
    if not named and is_needed:
        seen = ", ".join(file.name for file in there[:5]) or "no file of rows"
        raise RecipeError(
            f"{name}: no file in {folder} is called {split}.jsonl, .json, .csv or .parquet; found {seen}."
        )
    return named[0] if named else folder


def _is_inside(inner: Path, outer: Path) -> bool:
    return outer.resolve() in inner.expanduser().resolve().parents


def _columns(params: LLMTrainingParams, write: Any, row: Mapping[str, Any] | None) -> Rows:
    """How the columns that the parameters name are read."""
    if row is None:
        return Rows()
    text, prompt = params.text_column, params.prompt_text_column
    missing = [name for name in ("text_column", "prompt_text_column") if _is_missing(params, name, row)]
    if missing:
        problems = []
        for name in missing:
            near = nearest(getattr(params, name), list(row))
            hint = f" Did you mean {near}?" if near else ""
            problems.append(
                f"{write(name)}: no column {getattr(params, name)!r} in the first row, which has "
                f"{', '.join(map(repr, row))}.{hint}"
            )
        raise DataError(problems)
    if prompt is not None:
        pair = {"prompt": prompt, "completion": text}
        renamed = {ours: theirs for ours, theirs in pair.items() if ours != theirs}
        return Rows({"data.format": "prompt_completion", **named(renamed)}, None, isinstance(row[text], str))
    if text not in row:
        # No text, and none was named: its format is told by its keys.
        return Rows({}, None, detect(row, Origin("the first row", 1, "row")).name in PLAIN)
    found, is_plain = of_column(text, row[text])
    return Rows(found, None, is_plain)


def _is_missing(params: LLMTrainingParams, name: str, row: Mapping[str, Any]) -> bool:
    column = getattr(params, name)
    is_asked_for = name in params.model_fields_set or (name == "text_column" and params.prompt_text_column is not None)
    return column is not None and column not in row and is_asked_for
