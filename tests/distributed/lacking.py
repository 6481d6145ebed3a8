"""What the installed torch may lack: a run that wants it must have been refused in words, before a weight was read."""

from __future__ import annotations

from typing import Any

from tests.distributed.crew import Crew
from training_hub.backends.torch_engine.layouts.abilities import can_split_backward
from training_hub.backends.torch_engine.layouts.stages import ORDERS


def lacks_order(ended: list[Any], parallelism: dict[str, Any]) -> bool:
    """Whether the stages were to work in an order that this torch gets wrong."""
    order = parallelism.get("pipeline_parallel_schedule", "1F1B")
    return ORDERS[order].splits and not can_split_backward() and _refused(ended, f"{order} makes gradients of weights")


def lacks_slices(ended: list[Any], crew: Crew, parallelism: dict[str, Any], sections: dict[str, Any]) -> bool:
    """Whether quantised weights were to lie in slices, and this torch makes none of bytes."""
    is_wanted = "data_parallel_shard_degree" in parallelism and "quantization" in sections.get("model", {})
    if not is_wanted or all(crew.call("tests.distributed.moving:slices_bytes")):
        return False
    return _refused(ended, "makes no slices of")


def _refused(ended: list[Any], words: str) -> bool:
    for each in ended:
        assert each.get("error") == "RecipeError" and words in " ".join(each["problems"]), each
    return True
