"""The devices of a run, and how weights and packs lie on them.

Degrees are those of the section `parallelism`, which EasyDeL spells as sharding_axis_dims (dp, fsdp, ep, tp, sp). They
multiply to the number of devices of this process. XLA divides the work by where its inputs lie; what it computes is
pinned to where it is to stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from training_hub.backends.jax_engine.batches import Arrays
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import LEFT, RIGHT, adapter_key, leaves
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism, degrees_of

REPLICAS, SHARDS, TENSOR = "dp", "fsdp", "tp"

SIDES: Mapping[str, str] = {"width": SHARDS, "heads": TENSOR, "hidden": TENSOR}
"""Along which axis of the mesh each dimension of a weight is divided. Of a table of embeddings only the width is: its
rows are looked up by tokens that lie elsewhere."""


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid. specs: how each weight is divided, by its name in memory."""

    grid: jax.sharding.Mesh
    specs: Mapping[str, PartitionSpec]

    @property
    def layout(self) -> dict[str, int]:
        """How many devices each axis has."""
        return {str(name): int(size) for name, size in self.grid.shape.items()}

    @property
    def rows(self) -> int:
        """Packs that go through the devices side by side."""
        return self.layout[REPLICAS] * self.layout[SHARDS]

    @property
    def is_single(self) -> bool:
        return self.grid.size == 1

    def sharding(self, name: str) -> NamedSharding:
        """Where the weight of this name lies."""
        return NamedSharding(self.grid, self.specs.get(name, PartitionSpec()))

    def place(self, weights: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The weights on the devices."""
        return {name: jax.device_put(weight, self.sharding(name)) for name, weight in weights.items()}

    def spread(self, arrays: Arrays) -> Arrays:
        """A batch on the devices, each row on those that share it."""
        rows, all_of_them = (NamedSharding(self.grid, PartitionSpec(*axes)) for axes in ([(REPLICAS, SHARDS)], []))
        placed = replace(arrays, chunks=np.asarray(arrays.chunks))
        wanted = Arrays(rows, rows, rows, rows, rows, rows, all_of_them)
        return jax.device_put(placed, wanted)

    def pin(self, name: str, value: Array) -> Array:
        """Within a program: let what belongs to a weight lie as the weight does."""
        return value if self.is_single else lax.with_sharding_constraint(value, self.sharding(name))

    def pinned(self, tree: Mapping[str, Array]) -> dict[str, Array]:
        """`pin` for each of a dictionary by names of weights."""
        return {name: self.pin(name, value) for name, value in tree.items()}

    def gathered(self, value: Array) -> Array:
        """Within a program: a value that every device has whole."""
        if self.is_single:
            return value
        return lax.with_sharding_constraint(value, NamedSharding(self.grid, PartitionSpec()))


def mesh_of(asked: Parallelism, shape: Shape) -> Mesh:
    """The mesh of this process's devices. Raises RecipeError where the degrees do not multiply to their number."""
    count = jax.local_device_count()
    try:
        degrees = degrees_of(asked, count)
    except RecipeError as error:
        raise RecipeError(
            f"{error} With backend: jax it is the devices of the one process that count: {count}."
        ) from error
    grid = jax.make_mesh(
        (degrees.dp_replicate, degrees.dp_shard, degrees.tp),
        (REPLICAS, SHARDS, TENSOR),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    return Mesh(grid, specs_of(shape, {str(name): int(size) for name, size in grid.shape.items()}))


def specs_of(shape: Shape, sizes: Mapping[str, int]) -> dict[str, PartitionSpec]:
    """How each weight is divided: where a side does not divide evenly it stays whole."""
    lengths = {"width": shape.width, "heads": shape.kv_heads * shape.head_dim, "hidden": shape.hidden}
    if shape.experts:
        lengths["hidden"] = np.gcd(shape.hidden, shape.expert_hidden)
    fitting = {side: axis for side, axis in SIDES.items() if lengths[side] % sizes[axis] == 0}
    if shape.kv_heads % sizes[TENSOR]:
        fitting.pop("heads", None)
    found: dict[str, PartitionSpec] = {}
    for key, leaf in leaves(shape):
        found[key] = PartitionSpec(*(fitting.get(side) for side in leaf.axes))
        if leaf.is_linear:
            out, into = leaf.axes[::-1] if leaf.is_transposed else leaf.axes
            found[adapter_key(key, LEFT)] = PartitionSpec(fitting.get(out), None)
            found[adapter_key(key, RIGHT)] = PartitionSpec(None, fitting.get(into))
    return found
