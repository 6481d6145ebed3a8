"""Checkpoints of the torch engine: the tensors in them, which lie as `shared.checkpoint_folders` tells.

Random state is not among them because there is none: dropout is seeded by (seed, step), batches are a function of
(data, recipe, seed, step), the learning rate of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training_hub.backends.shared.checkpoint_folders import (
    OPTIMIZER,
    WEIGHTS,
    facts_of,
    newest_valid,
    prune,
    step_folder,
    steps_in,
    write_checkpoint,
)


@dataclass(frozen=True)
class State:
    """What a checkpoint holds. `facts` is plain JSON: step, seed, best, fingerprints, versions."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, root: Path, keep_last: int | None = None):
        self.root = root
        self.keep_last = keep_last

    def save(self, state: State, recipe_yaml: str, protected: Collection[int] = ()) -> Path:
        """Write step-N, then remove what is older than `keep_last`, never one of the steps `protected`.

        Raises OSError or SafetensorError where the disk refuses; earlier checkpoints are then as they were.
        """
        with write_checkpoint(self.root, state.step, state.facts, recipe_yaml) as aside:
            save_file(_contiguous(state.weights), aside / WEIGHTS)
            save_file(_contiguous(state.optimizer), aside / OPTIMIZER)
        prune(self.root, state.step, self.keep_last, protected)
        return self.folder(state.step)

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; by name, never by time of change."""
        return steps_in(self.root)

    def folder(self, step: int) -> Path:
        return step_folder(self.root, step)

    def newest_valid(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose files are all as written. Damaged ones are named, and left where they are.

        What a killed process left unfinished is cleared away first. Raises CheckpointError where checkpoints exist and
        none is whole.
        """
        return newest_valid(self.root, say)

    def load(self, step: int) -> State:
        """The state saved at `step`, on the CPU. Call `newest_valid` first: this does not check sums again."""
        folder = self.folder(step)
        return State(
            step=step,
            weights=load_file(folder / WEIGHTS),
            optimizer=load_file(folder / OPTIMIZER),
            facts=self.facts(step),
        )

    def facts(self, step: int) -> dict[str, Any]:
        """What was noted beside the tensors of `step`."""
        return facts_of(self.folder(step))

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights of `step`, without reading one."""
        with safe_open(self.folder(step) / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
