"""What a run computes on and in what: device, number format, attention, and what layers forget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from training_hub.backends.jax_engine.attention import Attention, Heads, choose
from training_hub.backends.jax_engine.batches import Arrays, Sizes, side_by_side
from training_hub.backends.jax_engine.decoder import Build
from training_hub.backends.jax_engine.forward import FORGET, Forward
from training_hub.backends.jax_engine.full import Adaptation
from training_hub.backends.jax_engine.materials import Materials
from training_hub.backends.jax_engine.mesh import Mesh
from training_hub.backends.jax_engine.noise import Rates, noise_of
from training_hub.backends.jax_engine.objective import TokenLoss
from training_hub.backends.jax_engine.osft import Spaces
from training_hub.backends.jax_engine.processes import ALONE, Group
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.spaces import merged
from training_hub.backends.jax_engine.step import Merge, Steps
from training_hub.backends.shared.host_memory import free_host_gib
from training_hub.data.cache import cache_folder
from training_hub.data.feed import Feed
from training_hub.recipe import Recipe
from training_hub.types import Console

PREFERRED_TOKENS = {"cpu": 8192, "gpu": 32768, "tpu": 32768}
"""Tokens per pack that keep the matrix units busy; the torch engine has the same numbers, and so the same packs."""

GIB = 2**30

USABLE = 0.9
"""Share of the free memory that a step may be planned to take."""

MOST_BYTES_OF_PROGRAMS = 2**32
"""Room on disk for compiled programs; one of a small model takes some megabytes."""

BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""What Linux calls the instructions that multiply bfloat16, as the torch engine asks for them."""


@dataclass(frozen=True)
class Machine:
    """platform: cpu, gpu or tpu. dtype: the format of forward and backward."""

    platform: str
    dtype: str

    def is_scanned(self, forget: str) -> bool:
        """On a CPU layers that are laid out run 1.4 times as fast, and forget nothing whatever they are asked to;
        elsewhere one that is scanned compiles faster."""
        return self.platform != "cpu" or forget != "none"


def machine_of(recipe: Recipe) -> Machine:
    """The machine of this process, and the format that the recipe means on it."""
    platform = jax.default_backend()
    wanted = recipe.model.dtype
    if wanted == "auto":
        wanted = "bfloat16" if platform != "cpu" or _multiplies_bfloat16() else "float32"
    return Machine(platform, wanted)


def keep_programs(recipe: Recipe) -> None:
    """Keep compiled programs on disk beside tokenised data, unless JAX was told where or data.cache is off.

    Those not used for longest go where they take more room than they may.
    """
    if recipe.data.cache and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(recipe.data.cache_dir) / "jax"))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES_OF_PROGRAMS)


def attention_of(shape: Shape, machine: Machine, longest: int, mesh: Mesh) -> Attention:
    """The attention of a run whose longest sample has so many tokens."""
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim, shape.windows)
    only_blocks = not mesh.is_single or shape.attention_dropout > 0  # no other drops shares
    return choose(heads, longest, machine.dtype, machine.platform, only_blocks)


def build_of(shape: Shape, attention: Attention, machine: Machine, mesh: Mesh, adaptation: Adaptation) -> Build:
    """What the forward pass is built from, where nothing is drawn at random."""
    attend, mix, dtype = mesh.attending(attention.attend), mesh.mixing(shape), jnp.dtype(machine.dtype)
    return Build(shape, attend, dtype, adaptation.scale, mesh.gathered, mix)


@dataclass(frozen=True)
class Programs:
    """The compiled functions of a run, and what they were made for.

    sizes: of packs. temporary: bytes that the step on the largest pack takes beside weights, moments and the sums of
    gradients, as XLA plans it; None where it does not tell.
    """

    steps: Steps
    attention: Attention
    sizes: Sizes
    temporary: int | None


def programs(
    recipe: Recipe,
    materials: Materials,
    machine: Machine,
    mesh: Mesh,
    feed: Feed,
    adaptation: Adaptation,
    halves: tuple[Any, Any],
    console: Console,
    group: Group = ALONE,
) -> Programs:
    """The functions of a run; `auto` forgets as little of each layer as the free memory allows.

    halves: what trains and what stays: arrays, or only their shapes, formats and places.
    """
    shape = materials.shape
    sizes = Sizes.of(max(feed.settings.token_budget, materials.longest), parts=mesh.parts)
    packs, rates = [feed.largest_pack()], Rates.of(recipe, shape, adaptation.dropout)
    largest = mesh.spread(side_by_side(packs, sizes, mesh.rows))
    if rates.is_any:
        largest = replace(largest, noise=noise_of(packs, largest.positions, recipe.seed, 0))
    attention = attention_of(shape, machine, materials.longest, mesh)
    build = replace(build_of(shape, attention, machine, mesh, adaptation), rates=rates)
    merge: Merge = merged if isinstance(adaptation, Spaces) else dict
    loss, wanted = TokenLoss.of(recipe.loss), recipe.training.activation_checkpointing
    ways = (wanted,) if wanted != "auto" else tuple(FORGET)
    free = _free_bytes(machine)
    for how in ways:
        steps = Steps(Forward(build, how, machine.is_scanned(how)), loss, mesh, merge)
        temporary = _temporary_bytes(steps, mesh, largest, *halves)
        sums = sum(4 * prod(mesh.sharding(name).shard_shape(one.shape)) for name, one in halves[0].items())
        is_short = temporary is not None and free is not None and temporary + sums > USABLE * free
        if how == ways[-1] or not group.highest("a plan of the memory", [int(is_short)])[0]:
            break
        took = "more than some process has" if temporary is None else f"{(temporary + sums) / GIB:.3g} GiB"
        console.say(f"model: with activation_checkpointing {how} a step takes {took} beside weights")
    return Programs(steps, attention, sizes, temporary)


def _temporary_bytes(steps: Steps, mesh: Mesh, largest: Arrays, trained: Any, frozen: Any) -> int | None:
    """What a step takes beside weights, optimizer and sums of gradients, as XLA plans it."""
    sums = {
        name: jax.ShapeDtypeStruct(one.shape, jnp.float32, sharding=mesh.sharding(name))
        for name, one in trained.items()
    }
    planned = steps.add.lower(trained, frozen, sums, largest).compile().memory_analysis()  # type: ignore[attr-defined]
    return None if planned is None else int(planned.temp_size_in_bytes)


def _free_bytes(machine: Machine) -> float | None:
    if machine.platform == "cpu":
        free = free_host_gib()
        return None if free is None else free * GIB
    told = jax.local_devices()[0].memory_stats()
    return None if not told else float(told["bytes_limit"] - told["bytes_in_use"])


def _multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return bool(BFLOAT16_FLAGS & set(flags.split()))
