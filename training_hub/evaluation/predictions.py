"""What a model said to each row, and the file that shows it: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training_hub.errors import DataError
from training_hub.folders import write_text

FILE_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One answer. row: where the row stands. finish_reason: "stop", or "length" where the limit cut it."""

    row: str
    prompt: str
    reference: str
    answer: str
    finish_reason: str
    tokens: int
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sitting:
    """All answers of one model to one set of rows, and their scores: by metric, `unfinished` and `answer_tokens`."""

    predictions: tuple[Prediction, ...]
    scores: dict[str, float]


def sitting_as_json(sitting: Sitting) -> dict[str, Any]:
    """What `read_sitting` reads."""
    return {"predictions": [asdict(one) for one in sitting.predictions], "scores": dict(sitting.scores)}


def read_sitting(content: Mapping[str, Any]) -> Sitting:
    """The sitting of `sitting_as_json`, which another process may have sent."""
    return Sitting(tuple(Prediction(**one) for one in content["predictions"]), dict(content["scores"]))


def side_by_side(sittings: Mapping[str, Sequence[Prediction]]) -> list[dict[str, Any]]:
    """One object for each row: what was asked and wanted, then by name of the model what it said.

    Prompt and reference are as the first has them. All must have answered the same rows in the same order. Raises
    DataError.
    """
    named = list(sittings.items())
    asked = [[one.row for one in said] for _, said in named]
    if any(each != asked[0] for each in asked):
        raise DataError(f"predictions: {', '.join(sittings)} answered different rows, which cannot stand side by side.")
    return [
        {
            "row": rows[0].row,
            "prompt": rows[0].prompt,
            "reference": rows[0].reference,
            **{name: said(one) for (name, _), one in zip(named, rows, strict=True)},
        }
        for rows in zip(*(each for _, each in named), strict=True)
    ]


def said(one: Prediction) -> dict[str, Any]:
    """What one model did with one row."""
    return {
        "answer": one.answer,
        "finish_reason": one.finish_reason,
        "tokens": one.tokens,
        "scores": dict(one.scores),
    }


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write them so that they can be read again; the file is as before or complete."""
    write_rows(path, (asdict(one) for one in predictions))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file is as before or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote. Raises DataError where it is something else."""
    try:
        return [Prediction(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as predictions: {error}. Delete it.") from error


@dataclass(frozen=True)
class Reply:
    """What a model said in a conversation. finish_reason: "stop", or "length" where the limit cut it."""

    text: str
    finish_reason: str
    tokens: int
    seconds: float
