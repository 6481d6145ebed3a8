"""metrics.jsonl: one JSON object per optimizer step, the record all other views can be made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from training_hub.errors import DataError
from training_hub.folders import write_text
from training_hub.types import StepReport

FILE_NAME = "metrics.jsonl"


def metrics_row(report: StepReport) -> dict[str, Any]:
    """What metrics.jsonl holds of a step: plain values; floats as they are, NaN and infinity as None.

    Which they were stands under `nonfinite`: {"loss": "nan"}. Step 0 is the validation before training; it has no loss.
    """
    row: dict[str, Any] = {"step": report.step, "epoch": report.epoch}
    if report.step > 0:
        row |= {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens": report.tokens,
            "trained_tokens": report.trained_tokens,
            "samples": report.samples,
            "tokens_per_second": report.tokens_per_second,
            "trained_tokens_per_second": report.trained_tokens_per_second,
            "step_seconds": report.step_seconds,
            "memory_gib": report.memory_gib,
            "skipped": report.skipped,
        }
    if report.peak_fraction is not None:
        row["peak_fraction"] = report.peak_fraction
    row |= report.measures
    if report.validation_loss is not None:
        row |= {"validation_loss": report.validation_loss, "validation_perplexity": report.validation_perplexity}
    row |= {f"validation_{name}": value for name, value in report.scores.items()}
    row["time"] = report.time
    nonfinite = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    row |= dict.fromkeys(nonfinite)
    return row | ({"nonfinite": nonfinite} if nonfinite else {})


class MetricsFile:
    """A watcher that writes each step to `path` at once.

    A run that goes on from `resume_step` keeps the lines up to that step; what an earlier process wrote beyond it, and
    a line it did not finish, are dropped. With resume_step 0 the file begins anew. Raises DataError for a file that
    is not one of ours.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        kept = (
            [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step and path.exists() else []
        )
        write_text(path, "".join(_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1, newline="\n")

    def __call__(self, report: StepReport) -> None:
        self._file.write(_line(metrics_row(report)))

    def close(self, status: str = "finished") -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line that was not written to its end is left out.

    Raises DataError naming a line that is damaged otherwise.
    """
    lines = path.read_bytes().split(b"\n")
    rows = []
    # What follows the last newline is empty, or a line that a killed process did not finish.
    for number, line in enumerate(lines[:-1], start=1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}). Delete the line, or restore the file.") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{where}: not an object with a 'step'. Delete the line, or restore the file.")
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    # Python writes the shortest digits that read back as the same float.
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")) + "\n"
