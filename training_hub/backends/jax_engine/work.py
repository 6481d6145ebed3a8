"""What the products of a run's weights take: their operations, and how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training_hub.backends.jax_engine.build import Machine
from training_hub.backends.jax_engine.osft import LEFT as FACTOR
from training_hub.backends.jax_engine.products import ein
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import ends, leaves
from training_hub.backends.jax_engine.weights import size_of
from training_hub.backends.shared.sameness import Shapes

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2
"""Operations of each number of a matrix for each token: one product forward, and one for each gradient."""

SMALLEST_SIDE, LARGEST_SIDE = 512, {"cpu": 2048}
LARGEST_ELSEWHERE = 8192
A_MOMENT, MEASURING_SECONDS = 0.008, 0.12
"""Sides of the square matrices that are timed: doubled until one product takes a moment, or memory would be felt."""


def operations(shape: Shape, trained: Shapes) -> tuple[float, float]:
    """Floating-point operations of a run's products of weights: for each token, and in the head for each trained token.

    trained: what trains, by name. Of experts those count that a token is sent to; tables are looked up.
    """
    outer = {leaf.key(0) for leaf in ends(shape).values()}
    per_token = 0.0
    for key, leaf in leaves(shape):
        if key not in outer and len(leaf.axes) > 1:
            share = shape.experts_per_token / shape.experts if leaf.is_of_experts else 1.0
            per_token += prod(size_of(leaf, key, shape)) * share * _each(key, trained)
    per_token += sum(prod(size) * _each(name, trained) for name, size in trained.items() if ".lora_" in name)
    head = ends(shape)["embed" if shape.is_tied else "head"].key(0)
    return per_token, float(shape.vocabulary * shape.width * _each(head, trained))


def _each(key: str, trained: Collection[str]) -> int:
    is_trained = key in trained or f"{key}{FACTOR}" in trained
    return FORWARD + INPUT_GRADIENT + (WEIGHT_GRADIENT if is_trained else 0)


def time_of_products(shape: Shape, trained: Shapes, run: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """Seconds that the run's products of weights take at the rate of one measured product: a bound from below."""
    per_token, per_trained = operations(shape, trained)
    rate = measured_peak(machine)
    return {
        "at_least_seconds": (per_token * run["tokens"] + per_trained * run["trained_tokens"]) / rate,
        "basis": f"a matrix product in {machine.dtype} measured now on {machine.platform}: {rate / 1e12:.3g} TFLOP/s",
    }


def measured_peak(machine: Machine) -> float:
    """Operations per second of a product as layers make it: the best of several, of the best size tried."""
    largest, side, best = LARGEST_SIDE.get(machine.platform, LARGEST_ELSEWHERE), SMALLEST_SIDE, 0.0
    multiply = jax.jit(lambda left, right: ein("ab,bc->ac", left, right))
    matrices = _random(side, machine)
    _seconds(multiply, *matrices)  # compiles
    began = time.perf_counter()
    while True:
        taken = _seconds(multiply, *matrices)
        best = max(best, 2 * side**3 / taken)
        if time.perf_counter() - began > MEASURING_SECONDS:
            return best
        if taken < A_MOMENT and side < largest:
            side *= 2
            matrices = _random(side, machine)
            _seconds(multiply, *matrices)


def _random(side: int, machine: Machine) -> list[Any]:
    # Random numbers: a GPU draws less power on zeros, and is faster than it will be.
    random = np.random.default_rng(0)
    return [jnp.asarray(random.random((side, side), np.float32) - 0.5, machine.dtype) for _ in range(2)]


def _seconds(multiply: Any, left: Any, right: Any) -> float:
    began = time.perf_counter()
    multiply(left, right).block_until_ready()
    return time.perf_counter() - began
