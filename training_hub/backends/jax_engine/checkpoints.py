"""Checkpoints of the jax engine: the tensors in them, under the names that the torch engine gives them.

They are written whole, and read whole or in the pieces that processes of the torch engine write.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from training_hub.backends.shared.checkpoint_folders import (
    OPTIMIZER,
    WEIGHTS,
    facts_of,
    prune,
    step_folder,
    steps_in,
    write_checkpoint,
)
from training_hub.backends.shared.sameness import Shapes
from training_hub.errors import CheckpointError

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
        return _whole(folder, WEIGHTS), _whole(folder, OPTIMIZER), facts_of(folder)

    def steps(self) -> list[int]:
        return steps_in(self.root)

    def folder(self, step: int) -> Path:
        return step_folder(self.root, step)


def shapes_in(folder: Path) -> Shapes:
    """The shapes of the weights of a checkpoint, without reading one."""
    found: Shapes = {}
    for path in _files(folder, WEIGHTS):
        with safe_open(path, framework="numpy") as file:
            cuts = _cuts(file)
            for name in file.keys():  # noqa: SIM118
                found[name] = tuple(cuts[name][0]) if name in cuts else tuple(file.get_slice(name).get_shape())
    return found


def _files(folder: Path, name: str) -> list[Path]:
    """The file of whole tensors, or those of pieces, which processes of the torch engine wrote."""
    whole = folder / name
    return [whole] if whole.is_file() else sorted(folder.glob(f"{whole.stem}-rank*{whole.suffix}"))


def _cuts(file: Any) -> dict[str, tuple[list[int], list[int]]]:
    """By tensor the shape of the whole, and where the piece starts in it; {} in a file of whole ones."""
    found: dict[str, tuple[list[int], list[int]]] = json.loads((file.metadata() or {}).get("cuts", "{}"))
    return found


def _whole(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, put together. Raises CheckpointError where a part is missing."""
    found: dict[str, np.ndarray] = {}
    missing: dict[str, int] = {}
    for path in _files(folder, name):
        with safe_open(path, framework="numpy") as file:
            cuts = _cuts(file)
            for key in file.keys():  # noqa: SIM118
                piece = file.get_tensor(key)
                if key not in cuts:
                    found[key] = piece
                    continue
                shape, starts = cuts[key]
                place = tuple(slice(start, start + size) for start, size in zip(starts, piece.shape, strict=True))
                whole = found.setdefault(key, np.zeros(shape, piece.dtype))
                whole[place] = piece
                missing[key] = missing.get(key, whole.size) - piece.size
    absent = [
        f"{key}: {count:,} of its numbers are in no file of {folder}." for key, count in missing.items() if count > 0
    ]
    if absent:
        raise CheckpointError(absent)
    return found
