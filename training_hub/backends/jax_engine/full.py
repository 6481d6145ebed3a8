"""What may move: the shape of an adaptation, and the one under which every weight moves that is not frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.freezing import parts_of
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import leaves
from training_hub.backends.shared.freezing import Turns, frozen_keys
from training_hub.backends.shared.sameness import Shapes
from training_hub.recipe.freezing import Freezing
from training_hub.types import Console

Weights = dict[str, np.ndarray]

Staying = dict[str, tuple[tuple[int, ...], str]]
"""Shapes and formats, by name."""


class Adaptation(Protocol):
    """What of a model moves, and how the result is written.

    undecayed: names of weights that do not decay, whatever their shape. scale: what adapters are multiplied by;
    dropout: the share of what goes into them that is dropped. file: of its weights, None for those of a whole model.
    own_format: of numbers that did not come with the model. turns: what begins to train later.
    """

    undecayed: frozenset[str]
    scale: float
    dropout: float
    file: str | None
    own_format: str | None
    turns: Turns

    def shapes(self) -> Shapes:
        """The shapes of what trains at some time of the run, before a weight is read."""
        ...

    def staying(self, formats: Mapping[str, str]) -> Staying:
        """The shapes and formats of what stays throughout, from the formats that the weights lie in."""
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
    """Every weight moves that is not frozen. source: the folder that the model came from; dtype: what is computed in.

    turns: what begins to move later. Raises RecipeError where freezing names what is not there, or leaves nothing.
    """

    undecayed: frozenset[str] = frozenset()
    scale = 1.0
    dropout = 0.0
    file: str | None = None
    own_format: str | None = None

    def __init__(self, shape: Shape, source: Path, freezing: Freezing | None = None, dtype: str = "float32"):
        self._shape, self._source, self._dtype = shape, source, dtype
        parts, asked = parts_of(shape), freezing or Freezing()
        self._frozen = frozen_keys(parts, asked)
        self.turns = Turns.of(parts, asked, self._frozen)

    def shapes(self) -> Shapes:
        sizes = ((key, files.size_of(leaf, key, self._shape)) for key, leaf in leaves(self._shape))
        return {key: size for key, size in sizes if key not in self._frozen}

    def staying(self, formats: Mapping[str, str]) -> Staying:
        found: Staying = {}
        for key, leaf in leaves(self._shape):
            if key in self._frozen:
                is_exact = len(leaf.axes) > 1 and formats[key] == self._dtype
                found[key] = (files.size_of(leaf, key, self._shape), self._dtype if is_exact else "float32")
        return found

    def split(self, weights: Weights) -> tuple[Weights, Weights]:
        trained = {key: weight for key, weight in weights.items() if key not in self._frozen}
        return trained, {key: self._kept(weights[key]) for key in weights if key not in trained}

    def _kept(self, weight: np.ndarray) -> np.ndarray:
        """A weight that stays, in the format that is computed in where that holds it exactly."""
        lower = weight.astype(files.number_format(self._dtype)) if weight.ndim >= 2 else weight
        return lower if np.array_equal(lower.astype(weight.dtype), weight) else weight

    def tensors(self, trained: Weights, frozen: Weights, formats: Mapping[str, str]) -> Weights:
        written = files.named({**frozen, **trained}, formats, self._shape)
        return files.as_they_came(written, self._shape, self._source)

    def write(self, tensors: Weights, folder: Path, dtype: str | None) -> None:
        files.save(tensors, folder)
        files.copy_configs(self._source, folder, dtype)

    def read(self, folder: Path, console: Console) -> Weights:
        return files.load(folder, self._shape, console).weights
