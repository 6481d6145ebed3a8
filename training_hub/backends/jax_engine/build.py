"""What a run computes on and in what: device, number format, attention, and what layers forget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from training_hub.backends.jax_engine.attention import Attention, choose
from training_hub.backends.jax_engine.batches import Arrays
from training_hub.backends.jax_engine.decoder import Build
from training_hub.backends.jax_engine.forward import FORGET, Forward
from training_hub.backends.jax_engine.mesh import Mesh
from training_hub.backends.jax_engine.objective import TokenLoss
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.step import Merge, Steps
from training_hub.backends.shared.host_memory import free_host_gib
from training_hub.data.cache import cache_folder
from training_hub.recipe import Recipe
from training_hub.types import Console

PREFERRED_TOKENS = {"cpu": 8192, "gpu": 32768, "tpu": 32768}
"""Tokens per pack that keep the matrix units busy; the torch engine has the same numbers, and so the same packs."""

USABLE = 0.9
"""Share of the free memory that a step may be planned to take."""

BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""What Linux calls the instructions that multiply bfloat16, as the torch engine asks for them."""


@dataclass(frozen=True)
class Machine:
    """platform: cpu, gpu or tpu. dtype: the format of forward and backward."""

    platform: str
    dtype: str

    @property
    def is_scanned(self) -> bool:
        """On a CPU layers that are laid out run 1.4 times as fast; elsewhere one that is scanned compiles faster."""
        return self.platform != "cpu"


def machine_of(recipe: Recipe) -> Machine:
    """The machine of this process, and the format that the recipe means on it."""
    platform = jax.default_backend()
    wanted = recipe.model.dtype
    if wanted == "auto":
        wanted = "bfloat16" if platform != "cpu" or _multiplies_bfloat16() else "float32"
    return Machine(platform, wanted)


def keep_programs(recipe: Recipe) -> None:
    """Keep compiled programs on disk beside tokenised data, unless JAX was told where or data.cache is off."""
    if recipe.data.cache and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(recipe.data.cache_dir) / "jax"))


def attention_of(shape: Shape, machine: Machine, longest: int) -> Attention:
    """The attention of a run whose longest sample has so many tokens."""
    return choose(shape.heads, shape.kv_heads, shape.head_dim, longest, machine.dtype)


def build_steps(
    recipe: Recipe,
    shape: Shape,
    machine: Machine,
    attention: Attention,
    scale: float,
    merge: Merge,
    mesh: Mesh,
    largest: Arrays,
    weights: Any,
    console: Console,
) -> Steps:
    """The compiled functions of the run; auto forgets as little of each layer as the free memory allows.

    scale, merge: of the adaptation. largest: the largest batch; weights: what trains and what stays.
    """
    build = Build(shape, attention.attend, jnp.dtype(machine.dtype), scale, mesh.gathered)
    loss, wanted = TokenLoss.of(recipe.loss), recipe.training.activation_checkpointing
    ways = (wanted,) if wanted != "auto" else tuple(FORGET)
    free = _free_bytes(machine) if len(ways) > 1 else None
    for how in ways:
        steps = Steps(Forward(build, how, machine.is_scanned), loss, mesh, merge)
        needed = None if free is None else _temporary_bytes(steps, largest, *weights)
        if needed is None or free is None or needed <= USABLE * free:
            break
        console.say(f"model: with activation_checkpointing {how} a step takes {needed / 2**30:.3g} GiB beside weights")
    return steps


def _temporary_bytes(steps: Steps, largest: Arrays, trained: dict[str, Array], frozen: dict[str, Array]) -> int | None:
    """What a step takes beside weights and optimizer, as XLA plans it: gradients, and what is between."""
    sums = steps.nothing(trained)
    planned = steps.add.lower(trained, frozen, sums, largest).compile().memory_analysis()  # type: ignore[attr-defined]
    return None if planned is None else int(planned.temp_size_in_bytes + planned.output_size_in_bytes)


def _free_bytes(machine: Machine) -> float | None:
    if machine.platform == "cpu":
        free = free_host_gib()
        return None if free is None else free * 2**30
    told = jax.local_devices()[0].memory_stats()
    return None if not told else float(told["bytes_limit"] - told["bytes_in_use"])


def _multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return bool(BFLOAT16_FLAGS & set(flags.split()))
