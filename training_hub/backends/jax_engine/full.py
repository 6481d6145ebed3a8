"""What may move: the shape of an adaptation, and the one under which every weight moves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import leaves
from training_hub.backends.shared.sameness import Shapes
from training_hub.types import Console

Weights = dict[str, np.ndarray]


class Adaptation(Protocol):
    """What of a model moves, and how the result is written.

    undecayed: names of weights that do not decay, whatever their shape. scale: what adapters are multiplied by. file:
    of its weights, None for those of a whole model. own_format: of numbers that did not come with the model.
    """

    undecayed: frozenset[str]
    scale: float
    file: str | None
    own_format: str | None

    def shapes(self) -> Shapes:
        """The shapes of what trains, before a weight is read."""
        ...

    def split(self, weights: Weights) -> tuple[Weights, Weights]:
        """What trains and what stays, from the weights of the model."""
        ...

    def tensors(self, trained: Weights, frozen: Weights, formats: Mapping[str, str]) -> Weights:
        """The tensors of the final model, by their names in its files."""
        ...

    def write(self, tensors: Weights, folder: Path, dtype: str | None) -> None:
        """Write them with the configs that belong to them; `dtype` is what config.json is to say, None as it was."""
        ...

    def read(self, folder: Path, console: Console) -> Weights:
        """What trains, read again from a folder that `write` wrote."""
        ...


class Full:
    """Every weight moves. source: the folder that the model came from."""

    undecayed: frozenset[str] = frozenset()
    scale = 1.0
    file: str | None = None
    own_format: str | None = None

    def __init__(self, shape: Shape, source: Path):
        self._shape, self._source = shape, source

    def shapes(self) -> Shapes:
        return {key: files.size_of(leaf, key, self._shape) for key, leaf in leaves(self._shape)}

    def split(self, weights: Weights) -> tuple[Weights, Weights]:
        return weights, {}

    def tensors(self, trained: Weights, frozen: Weights, formats: Mapping[str, str]) -> Weights:
        return files.as_they_came(files.named(trained, formats, self._shape), self._shape, self._source)

    def write(self, tensors: Weights, folder: Path, dtype: str | None) -> None:
        files.save(tensors, folder)
        files.copy_configs(self._source, folder, dtype)

    def read(self, folder: Path, console: Console) -> Weights:
        return files.load(folder, self._shape, console).weights
