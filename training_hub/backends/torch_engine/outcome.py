"""What is said at the end of a run of how fast it was."""

from __future__ import annotations

from collections.abc import Iterator

from training_hub.backends.shared.outcome import final_metrics
from training_hub.backends.torch_engine.profile import table as split_table
from training_hub.backends.torch_engine.run import Run
from training_hub.monitoring.jsonl import read_metrics
from training_hub.monitoring.throughput import speed_line
from training_hub.recipe.folder import RunFolder


def speed_lines(run: Run, folder: RunFolder) -> Iterator[str]:
    """How fast the run was, and where the time of its steps went if it was asked to find out."""
    metrics = final_metrics(run, tuple(read_metrics(folder.metrics)))
    if metrics:
        yield speed_line(metrics)
    if run.profile is not None and run.profile.split is not None:
        yield from (f"profile: {line}" for line in split_table(run.profile.split))
