"""What is at odds in the section `parallelism`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from training_hub.recipe.findings import Contradiction, Names, is_default, plainly, value_at

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

OF_SHARDS = ("parallelism.fsdp_reshard_after_forward", "parallelism.enable_cpu_offload")
"""Settings that say how divided weights are handled."""

OF_STAGES = tuple(
    f"parallelism.pipeline_parallel_{name}"
    for name in ("schedule", "layers_per_stage", "first_stage_less_layers", "last_stage_less_layers")
)
"""Settings that say how layers are dealt out in stages, and how these work."""

OF_SPLITS = {
    "parallelism.disable_loss_parallel": "the whole vocabulary",
    "parallelism.sequence_parallel": "all tokens of a pack",
}
"""Settings that say how heads and the vocabulary are split, and what a process has of it where they are not."""


def about_layouts(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    """Settings of divided weights, heads and layers where none are divided."""
    degree = "parallelism.data_parallel_shard_degree"
    for path in OF_SHARDS:
        if recipe.parallelism.data_parallel_shard_degree == 1 and not is_default(recipe, path):
            yield Contradiction(
                (path, degree),
                f"{names(path)}: {plainly(value_at(recipe, path))} would change nothing while {names(degree)} is 1: "
                f"each process holds whole weights. Write {names.write(degree, -1)}, or leave {path} out.",
            )
    split = "parallelism.tensor_parallel_degree"
    for path, whole in OF_SPLITS.items():
        if recipe.parallelism.tensor_parallel_degree == 1 and not is_default(recipe, path):
            yield Contradiction(
                (path, split),
                f"{names(path)}: {plainly(value_at(recipe, path))} would change nothing while {names(split)} is 1: "
                f"each process has {whole}. Write {names.write(split, 2)}, or leave {path} out.",
            )
    stages = "parallelism.pipeline_parallel_degree"
    for path in OF_STAGES:
        if recipe.parallelism.pipeline_parallel_degree == 1 and not is_default(recipe, path):
            yield Contradiction(
                (path, stages),
                f"{names(path)}: {plainly(value_at(recipe, path))} would change nothing while {names(stages)} is 1: "
                f"each process has all layers. Write {names.write(stages, 2)}, or leave {path} out.",
            )
