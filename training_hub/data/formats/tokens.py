"""The format of rows that are tokenised already: input_ids, with labels or weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from training_hub.data.formats.settings import FormatSettings, Parsed, list_of, shown, weight_of
from training_hub.errors import DataError
from training_hub.types import Origin, Tokens

TOKEN_COLUMNS = ("input_ids", "labels", "weights", "attention_mask", "position_ids", "weight")
NOT_TRAINED = -100  # The label that torch's cross-entropy leaves out by default, and with it every trainer's data.


def holds_tokens(row: Mapping[str, Any]) -> bool:
    return "input_ids" in row


def parse_tokens(row: Mapping[str, Any], origin: Origin, settings: FormatSettings) -> Parsed:
    """A row {"input_ids", "labels"}: a label of -100 is not trained, any other has to be the id at its place.

    `weights` (numbers) may stand for labels or beside them; `attention_mask` may cut padding off the ends;
    `position_ids` may only say what holds anyway, 0, 1, 2, ... Rows of input_ids alone are trained whole with
    data.pretraining or unmask, else refused.
    """
    if "input_ids" not in row:
        raise DataError(f"{origin}: no input_ids; found columns {', '.join(map(str, row))}.")
    ids = _integers(row, "input_ids", origin)
    if not len(ids):
        raise DataError(f"{origin}: column 'input_ids' is empty; there is nothing to train on.")
    weights = _weights(row, ids, origin, settings) * np.float32(weight_of(row, origin))
    kept = _without_padding(row, len(ids), origin)
    _refuse_other_positions(row, kept, len(ids), origin)
    return Parsed(Tokens(ids[kept], weights[kept].astype(np.float32), origin))


def _integers(row: Mapping[str, Any], column: str, origin: Origin) -> np.ndarray:
    values = list_of(row[column], f"column {column!r}", origin)
    wrong = next(
        (value for value in values if isinstance(value, bool) or not isinstance(value, int | np.integer)), None
    )
    if wrong is not None:
        raise DataError(f"{origin}: column {column!r} holds {shown(wrong)}; whole numbers are wanted.")
    if max(map(abs, values), default=0) > np.iinfo(np.int32).max:
        raise DataError(f"{origin}: column {column!r} holds a number too large to be a token id.")
    return np.asarray(values, dtype=np.int32)


def _weights(row: Mapping[str, Any], ids: np.ndarray, origin: Origin, settings: FormatSettings) -> np.ndarray:
    has_labels, has_weights = row.get("labels") is not None, row.get("weights") is not None
    weights = np.ones(len(ids), np.float32)
    if has_weights:
        weights = _given_weights(row, len(ids), origin)
    if has_labels:
        weights = weights * _of_labels(row, ids, origin)
    elif not has_weights and not (settings.pretraining or settings.unmask):
        raise DataError(
            f"{origin}: input_ids without labels. Add labels (-100 where a token is not trained), or set data.unmask "
            "to train every token."
        )
    return weights


def _of_labels(row: Mapping[str, Any], ids: np.ndarray, origin: Origin) -> np.ndarray:
    labels = _integers(row, "labels", origin)
    _check_length("labels", len(labels), len(ids), origin)
    trained = labels != NOT_TRAINED
    wrong = np.flatnonzero(trained & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{origin}: labels[{at}] is {labels[at]}, but input_ids[{at}] is {ids[at]}; a label is the id at its own "
            "place (not shifted), or -100."
        )
    return trained.astype(np.float32)


def _given_weights(row: Mapping[str, Any], length: int, origin: Origin) -> np.ndarray:
    values = list_of(row["weights"], "column 'weights'", origin)
    _check_length("weights", len(values), length, origin)
    try:
        weights = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{origin}: column 'weights' holds something that is no number ({error}).") from error
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise DataError(f"{origin}: column 'weights' holds a number below 0 or not finite.")
    return weights


def _without_padding(row: Mapping[str, Any], length: int, origin: Origin) -> slice:
    """The part of the row that attention_mask calls real: all but zeros at its ends."""
    if row.get("attention_mask") is None:
        return slice(0, length)
    mask = _integers(row, "attention_mask", origin)
    _check_length("attention_mask", len(mask), length, origin)
    real = np.flatnonzero(mask == 1)
    if not len(real) or not np.isin(mask, (0, 1)).all() or len(real) != real[-1] - real[0] + 1:
        raise DataError(f"{origin}: attention_mask has to be ones, with zeros only at the ends.")
    return slice(int(real[0]), int(real[-1]) + 1)


def _refuse_other_positions(row: Mapping[str, Any], kept: slice, length: int, origin: Origin) -> None:
    """Positions that begin anew inside a row are those of several documents, which would see each other as one row."""
    if row.get("position_ids") is None:
        return
    positions = _integers(row, "position_ids", origin)
    _check_length("position_ids", len(positions), length, origin)
    positions = positions[kept]
    wrong = np.flatnonzero(positions != np.arange(len(positions)))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{origin}: position_ids[{kept.start + at}] is {positions[at]} where {at} is wanted. Give each document as "
            "a row of its own, and leave position_ids out: packing is ours."
        )


def _check_length(column: str, found: int, wanted: int, origin: Origin) -> None:
    if found != wanted:
        raise DataError(f"{origin}: {column} has {found} entries, input_ids {wanted}.")
