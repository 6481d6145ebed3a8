"""The devices of a run, and how weights and packs lie on them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax import Array

from training_hub.backends.jax_engine.batches import Arrays


class Mesh:
    """One device, which holds everything."""

    rows = 1
    """Packs that go through the devices side by side."""

    layout: Mapping[str, int] = MappingProxyType({})
    """How many devices each axis has."""

    def place(self, weights: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The weights on the devices."""
        return {name: jax.device_put(weight) for name, weight in weights.items()}

    def spread(self, arrays: Arrays) -> Arrays:
        """A batch on the devices."""
        return jax.device_put(arrays)
