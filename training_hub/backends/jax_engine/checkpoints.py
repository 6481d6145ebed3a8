"""Checkpoints of the jax engine: the tensors in them, under the names that the torch engine gives them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from training_hub.backends.shared.checkpoint_folders import (
    OPTIMIZER,
    WEIGHTS,
    facts_of,
    prune,
    step_folder,
    steps_in,
    write_checkpoint,
)

Tensors = Mapping[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, root: Path, keep_last: int | None = None):
        self.root = root
        self.keep_last = keep_last

    def save(
        self,
        step: int,
        weights: Tensors,
        optimizer: Tensors,
        facts: Mapping[str, Any],
        recipe_yaml: str,
        protected: Collection[int] = (),
    ) -> None:
        """Write step-N, then remove what is older than `keep_last`, never one of the steps `protected`."""
        with write_checkpoint(self.root, step, facts, recipe_yaml) as aside:
            save_file(dict(weights), aside / WEIGHTS)
            save_file(dict(optimizer), aside / OPTIMIZER)
        prune(self.root, step, self.keep_last, protected)

    def load(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
        """Weights, the optimizer's numbers and facts of a step that has been found whole."""
        folder = self.folder(step)
        return load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), facts_of(folder)

    def steps(self) -> list[int]:
        return steps_in(self.root)

    def folder(self, step: int) -> Path:
        return step_folder(self.root, step)
