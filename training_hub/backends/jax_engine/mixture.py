"""A mixture of experts: each token through those that its router likes best, weighted by how much."""

# B packs side by side, T tokens, N = B T, D width, E experts, k of them a token

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from training_hub.backends.jax_engine.activations import ACTIVATE
from training_hub.backends.jax_engine.products import linear
from training_hub.backends.jax_engine.shapes import Shape

Mix = Callable[[Any, Array, Mapping[str, Array]], Array]
"""(build, x [B, T, D], the weights of the layer) -> [B, T, D]."""


def mixed(build: Any, x_BTD: Array, weights: Mapping[str, Array]) -> Array:
    """What the mixture of a layer makes of each token."""
    each = (weights[name] for name in ("router", "gates", "ups", "downs"))
    return answers(build.shape, x_BTD, *each).astype(x_BTD.dtype)


def answers(
    shape: Shape, x_BTD: Array, router: Array, gates: Array, ups: Array, downs: Array, first: Array | int = 0
) -> Array:
    """[B, T, D] float32: the weighted sum of the answers of these experts, which are those from number `first` on.

    A token that none of them is asked about gets 0; the sum over all experts is what the layer says.
    """
    flat, here = x_BTD.reshape(-1, x_BTD.shape[-1]), len(gates)
    logits = linear(x_BTD, router).reshape(len(flat), -1)
    shares, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), shape.experts_per_token)
    if shape.norm_top_k:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    number = chosen.reshape(-1) - first
    number = jnp.where((number >= 0) & (number < here), number, here)
    order = jnp.argsort(number, stable=True)  # (token, expert) pairs, expert by expert, those of others last
    sizes = jnp.bincount(number, length=here + 1)[:here].astype(jnp.int32)
    tokens = order // shape.experts_per_token
    inputs = flat[tokens]
    gate, up = _by_expert(inputs, gates, sizes), _by_expert(inputs, ups, sizes)
    said = _by_expert(ACTIVATE[shape.activation](gate) * up, downs, sizes)
    said = said * shares.reshape(-1)[order].astype(said.dtype)[:, None]
    # What is beyond the last of these experts' pairs is not defined.
    said = jnp.where((jnp.arange(len(order)) < sizes.sum())[:, None], said, 0)
    summed = jnp.zeros(flat.shape, jnp.float32).at[tokens].add(said.astype(jnp.float32))
    return summed.reshape(x_BTD.shape)


def _by_expert(x_NI: Array, weight_EOI: Array, sizes_E: Array) -> Array:
    """[N, O]: the first sizes[0] rows times the first expert's matrix, the next with the second's, and so on."""
    turned = jnp.swapaxes(weight_EOI.astype(x_NI.dtype), 1, 2)
    precision = lax.Precision.HIGHEST if x_NI.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.ragged_dot(x_NI, turned, sizes_E, precision=precision, preferred_element_type=jnp.float32).astype(
        x_NI.dtype
    )
