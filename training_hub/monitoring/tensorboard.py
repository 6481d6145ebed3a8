"""Steps as TensorBoard event files, through the tensorboard package's own writer (without TensorFlow or torch)."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path

from training_hub.monitoring.progress_line import is_due
from training_hub.monitoring.series import series
from training_hub.monitoring.settings import public_settings
from training_hub.recipe import Recipe
from training_hub.types import StepReport

SECONDS_BETWEEN_FLUSHES = 10


def objection(recipe: Recipe) -> str | None:
    """Why TensorBoard files, if asked for, cannot be written here."""
    if recipe.monitoring.tensorboard is False or find_spec("tensorboard") is not None:
        return None
    return (
        "tensorboard is not installed: pip install 'training-hub[tensorboard]', or set monitoring.tensorboard to false."
    )


class TensorBoardFiles:
    """A watcher that writes events to the folder that the recipe names, `tensorboard` in the run folder by default.

    A run that goes on from `resume_step` tells TensorBoard to hide what an earlier process wrote beyond it.
    """

    def __init__(self, recipe: Recipe, run_folder: Path, resume_step: int = 0):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        asked = recipe.monitoring.tensorboard
        folder = Path(asked) if isinstance(asked, str) else run_folder / "tensorboard"
        self._interval = recipe.monitoring.log_interval
        self._writer = EventFileWriter(str(folder), flush_secs=SECONDS_BETWEEN_FLUSHES)
        if resume_step:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._write_settings(recipe, resume_step)

    def __call__(self, report: StepReport) -> None:
        if not is_due(report, self._interval):
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in series(report).items()]
        when = report.time or time.time()
        self._writer.add_event(Event(wall_time=when, step=report.step, summary=Summary(value=values)))

    def close(self, status: str = "finished") -> None:
        self._writer.close()

    def _write_settings(self, recipe: Recipe, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        # The text plugin shows Markdown; four spaces make it a block of code.
        text = "".join(f"    {line}\n" for line in json.dumps(public_settings(recipe), indent=2).splitlines())
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto())
        metadata = create_summary_metadata(display_name="recipe", description="")
        value = Summary.Value(tag="recipe", tensor=tensor, metadata=metadata)
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
