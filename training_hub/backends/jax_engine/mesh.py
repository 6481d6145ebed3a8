"""The devices of a run, of all its processes, and how weights and packs lie on them.

Degrees are those of the section `parallelism`; the axes have EasyDeL's names (sharding_axis_dims: dp, fsdp, ep, tp, sp)
and multiply to the number of devices. XLA divides the work by where its inputs lie; what it computes is pinned to where
it is to stay. Two things it would not find by itself are said: that attention needs the keys of all of a pack
(`attending`), and that tokens go to where their experts are (`mixing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from training_hub.backends.jax_engine.attention import Attend
from training_hub.backends.jax_engine.batches import Arrays
from training_hub.backends.jax_engine.mixture import Mix, answers, mixed
from training_hub.backends.jax_engine.osft import LEFT as OSFT_LEFT
from training_hub.backends.jax_engine.osft import PROTECTED, U0, V0
from training_hub.backends.jax_engine.osft import RIGHT as OSFT_RIGHT
from training_hub.backends.jax_engine.processes import placed
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import LEFT, RIGHT, Leaf, adapter_key, leaves
from training_hub.backends.jax_engine.weights import size_of
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism, degrees_of

REPLICAS, SHARDS, EXPERTS, TENSOR, TOKENS = AXES = ("dp", "fsdp", "ep", "tp", "sp")

ROWS = (REPLICAS, SHARDS, EXPERTS)
"""The axes along which devices have packs of their own; along the others they share them."""

Axis = str | tuple[str, ...] | None

SIDES: Mapping[str, Axis] = {"width": (SHARDS, EXPERTS), "heads": TENSOR, "hidden": TENSOR}
"""Along which axes of the mesh each dimension of a weight is divided. Of a table of embeddings only the width is: its
rows are looked up by tokens that lie elsewhere."""

OF_EXPERTS: Mapping[str, Axis] = {"experts": EXPERTS, "width": SHARDS, "hidden": TENSOR}
"""The same of the weights of experts, which are dealt out."""


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
        return self.layout[REPLICAS] * self.layout[SHARDS] * self.layout[EXPERTS]

    @property
    def parts(self) -> int:
        """Parts into which the tokens of each pack are divided."""
        return self.layout[TOKENS]

    @property
    def is_single(self) -> bool:
        return self.grid.size == 1

    def sharding(self, name: str) -> NamedSharding:
        """Where the weight of this name lies."""
        return self._along(*self.specs.get(name, ()))

    def _along(self, *axes: Axis) -> NamedSharding:
        return NamedSharding(self.grid, PartitionSpec(*axes))

    def place(self, weights: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The weights on the devices."""
        return {name: placed(weight, self.sharding(name)) for name, weight in weights.items()}

    def spread(self, arrays: Arrays) -> Arrays:
        """A batch on the devices, each row on those that share it, each part of its tokens on one of these."""
        tokens, parts = self._along(ROWS, TOKENS), self._along((*ROWS, TOKENS))
        where = dict.fromkeys(("ids", "positions", "segments"), tokens)
        where |= {**dict.fromkeys(("rows", "targets", "weights"), parts), "chunks": self._along()}
        return Arrays(**{name: placed(np.asarray(getattr(arrays, name)), sharding) for name, sharding in where.items()})

    def lay(self, rows: np.ndarray) -> Array:
        """What each row of a batch has, on the devices: rows are dealt out where they divide evenly, else all have
        all."""
        if self.is_single:
            return jax.numpy.asarray(rows)
        return placed(rows, self._along(ROWS) if len(rows) % self.rows == 0 else self._along())

    def pin(self, name: str, value: Array) -> Array:
        """Within a program: let what belongs to a weight lie as the weight does."""
        return value if self.is_single else lax.with_sharding_constraint(value, self.sharding(name))

    def pinned(self, tree: Mapping[str, Array]) -> dict[str, Array]:
        """`pin` for each of a dictionary by names of weights."""
        return {name: self.pin(name, value) for name, value in tree.items()}

    def gathered(self, value: Array) -> Array:
        """Within a program: a value that every device has whole."""
        return value if self.is_single else lax.with_sharding_constraint(value, self._along())

    def attending(self, attend: Attend) -> Attend:
        """Within a program: the same attention where tokens are divided: each device's queries, the keys of all."""
        return attend if self.parts == 1 else partial(self._attend, attend)

    def _attend(
        self, attend: Attend, q: Array, k: Array, v: Array, segments: Array, window: Array | int, **more: Any
    ) -> Array:
        if q.shape[1] % self.parts:  # a few tokens that are only looked at
            return attend(q, k, v, segments, window, **more)
        heads = TENSOR if k.shape[2] % self.layout[TENSOR] == 0 else None
        own, all_of_them = self._along(ROWS, TOKENS, heads), self._along(ROWS, None, heads)
        q = lax.with_sharding_constraint(q, own)
        k, v = (lax.with_sharding_constraint(each, all_of_them) for each in (k, v))
        segments = lax.with_sharding_constraint(segments, self._along(ROWS))
        return lax.with_sharding_constraint(attend(q, k, v, segments, window, **more), own)

    def mixing(self, shape: Shape) -> Mix:
        """Within a program: the mixture of experts of a layer, by the devices among which experts are dealt out."""
        if self.is_single or not shape.experts:
            return mixed
        first, *_ = (leaf for _, leaf in leaves(shape) if leaf.is_of_experts)
        spec = _spec(first, _fitting_experts(shape, self.layout))
        is_divided = TENSOR in spec
        into, out = PartitionSpec(spec[0], spec[1], None), PartitionSpec(spec[0], None, spec[1])
        tokens = PartitionSpec(ROWS, TOKENS, None)
        each = partial(_mixed_here, shape, self.layout[EXPERTS], is_divided)
        divided = jax.shard_map(
            each, mesh=self.grid, in_specs=(tokens, PartitionSpec(), into, into, out), out_specs=tokens
        )

        def mix(build: Any, x_BTD: Array, weights: Mapping[str, Array]) -> Array:
            if x_BTD.shape[0] % self.rows or x_BTD.shape[1] % self.parts:  # tokens that are only looked at, or made
                return mixed(build, x_BTD, weights)
            found: Array = divided(x_BTD, *(weights[name] for name in ("router", "gates", "ups", "downs")))
            return found

        return mix


def _mixed_here(
    shape: Shape, dealt: int, is_divided: bool, x_BTD: Array, router: Array, gates: Array, ups: Array, downs: Array
) -> Array:
    """What one device adds: its experts' answers to the tokens of all devices that experts are dealt out to."""
    # The router's product has a gradient of our own making, which does not say that it is to be added up.
    router = lax.pcast(router, (*ROWS, TOKENS), to="varying")
    if dealt > 1:
        x_BTD = lax.all_gather(x_BTD, EXPERTS, axis=0, tiled=True)
    first = lax.axis_index(EXPERTS) * gates.shape[0] if dealt > 1 else 0
    said = answers(shape, x_BTD, router, gates, ups, downs, first)
    said = lax.psum(said, TENSOR) if is_divided else said
    if dealt > 1:
        said = lax.psum_scatter(said, EXPERTS, scatter_dimension=0, tiled=True)
    return said.astype(x_BTD.dtype)


def mesh_of(asked: Parallelism, shape: Shape) -> Mesh:
    """The mesh of the devices of all processes. Raises RecipeError where degrees do not multiply to their number."""
    lengths = axes_of(asked, jax.device_count())
    grid = jax.make_mesh(tuple(lengths.values()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    return Mesh(grid, specs_of(shape, lengths))


def axes_of(asked: Parallelism, count: int) -> dict[str, int]:
    """The lengths of the axes over so many devices. Experts are dealt out to devices that divide weights."""
    try:
        degrees = degrees_of(asked.model_copy(update={"expert_parallel_degree": 1}), count)
    except RecipeError as error:
        raise RecipeError(
            f"{error} With backend: jax it is the devices of all processes that count: {count}."
        ) from error
    experts = asked.expert_parallel_degree
    if degrees.dp_shard % experts:
        raise RecipeError(
            f"parallelism.expert_parallel_degree: {experts}, but data_parallel_shard_degree is {degrees.dp_shard}, "
            f"which it must divide: experts are dealt out to devices among which weights are divided. Write "
            f"parallelism.data_parallel_shard_degree: {experts}."
        )
    sizes = (degrees.dp_replicate, degrees.dp_shard // experts, experts, degrees.tp, degrees.cp)
    return dict(zip(AXES, sizes, strict=True))


def specs_of(shape: Shape, sizes: Mapping[str, int]) -> dict[str, PartitionSpec]:
    """How each weight is divided: where a side does not divide evenly it stays whole."""
    fitting, of_experts = _fitting(shape, sizes), _fitting_experts(shape, sizes)
    found: dict[str, PartitionSpec] = {}
    for key, leaf in leaves(shape):
        found[key] = _spec(leaf, of_experts if leaf.is_of_experts else fitting)
        if leaf.is_linear:
            out, into = leaf.axes[::-1] if leaf.is_transposed else leaf.axes
            found[adapter_key(key, LEFT)] = PartitionSpec(fitting.get(out), None)
            found[adapter_key(key, RIGHT)] = PartitionSpec(None, fitting.get(into))
            found |= _of_spaces(key, leaf, fitting, size_of(leaf, key, shape))
    return found


def _of_spaces(key: str, leaf: Leaf, fitting: Mapping[str, Axis], size: tuple[int, ...]) -> dict[str, PartitionSpec]:
    """Of the factors of OSFT: each as the side of the matrix that it spans; the longer one is on the left."""
    long, short = (fitting.get(axis) for axis in (leaf.axes if size[0] >= size[1] else leaf.axes[::-1]))
    left, right = PartitionSpec(long, None), PartitionSpec(None, short)
    parts = {OSFT_LEFT: left, U0: left, PROTECTED: left, OSFT_RIGHT: right, V0: right}
    return {f"{key}{name}": spec for name, spec in parts.items()}


def _spec(leaf: Leaf, fitting: Mapping[str, Axis]) -> PartitionSpec:
    return PartitionSpec(*(fitting.get(side) for side in leaf.axes))


def _fitting(shape: Shape, sizes: Mapping[str, int]) -> dict[str, Axis]:
    lengths = {"width": shape.width, "heads": shape.kv_heads * shape.head_dim, "hidden": shape.hidden}
    found = _even(SIDES, lengths, sizes)
    if shape.kv_heads % sizes[TENSOR]:
        found.pop("heads", None)
    return found


def _fitting_experts(shape: Shape, sizes: Mapping[str, int]) -> dict[str, Axis]:
    lengths = {"experts": shape.experts, "width": shape.width, "hidden": shape.expert_hidden}
    return _even(OF_EXPERTS, lengths, sizes)


def _even(sides: Mapping[str, Axis], lengths: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Axis]:
    """The sides that their axes divide evenly."""
    found: dict[str, Axis] = {}
    for side, axes in sides.items():
        names = axes if isinstance(axes, tuple) else (axes,)
        if lengths[side] % prod(sizes[name] for name in names if name) == 0:
            found[side] = axes
    return found
