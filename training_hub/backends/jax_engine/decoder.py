"""The forward pass of the families that are one decoder with few differences: Llama and its kin.

Weights are looked up in the table by what they are. A layer is a pure function of its input and its weights, so that
layers can be laid out one after another, or be one program that runs over their stacked weights.
"""

# B packs side by side, T tokens, D width, H query heads, G key heads, d numbers of a head

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from training_hub.backends.jax_engine import rope
from training_hub.backends.jax_engine.activations import ACTIVATE
from training_hub.backends.jax_engine.attention import Attend
from training_hub.backends.jax_engine.mixture import Mix, mixed
from training_hub.backends.jax_engine.noise import NOTHING, Rates, drop, folded
from training_hub.backends.jax_engine.products import linear
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import LEFT, RIGHT

Weights = Mapping[str, Array]
"""Weights of one layer by leaf; `NAME.lora_A` and `NAME.lora_B` beside a matrix NAME are those of an adapter."""


@dataclass(frozen=True)
class Place:
    """Where each token stands: its document [B, T] (0: padding), and what rotates its heads [B, T, 1, d], or None.

    keys [B, T, 2]: from which numbers are drawn for it, or None where nothing is drawn.
    """

    segments: Array
    cosine: Array | None = None
    sine: Array | None = None
    keys: Array | None = None

    def at_layer(self, layer: Array | int) -> Place:
        """The same in a layer, which draws numbers of its own."""
        return self if self.keys is None else replace(self, keys=folded(self.keys, layer))


jax.tree_util.register_dataclass(Place, ["segments", "cosine", "sine", "keys"], [])


@dataclass(frozen=True)
class Build:
    """What a forward pass is built from, beside numbers: shape, attention, format, and what adapters multiply by.

    gather: within a program, lets every device have a value whole; the table of embeddings is looked up so. mix: what
    a mixture of experts does. rates: what is drawn at random in training.
    """

    shape: Shape
    attend: Attend
    dtype: Any
    adapter_scale: float = 1.0
    gather: Callable[[Array], Array] = lambda value: value
    mix: Mix = mixed
    rates: Rates = NOTHING


def place_of(shape: Shape, segments: Array, positions: Array, dtype: Any) -> Place:
    """The place of tokens at these positions [B, T] of their documents."""
    if not shape.rope:
        return Place(segments)
    inverse_d, factor = rope.frequencies(dict(shape.rope), shape.head_dim, shape.positions)
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(inverse_d)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return Place(segments, (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype))


def block(build: Build, x_BTD: Array, weights: Weights, place: Place, window: Array | int) -> Array:
    """One layer: attention, then the unit of the layer's kind, each on the normed input and added to it."""
    shape = build.shape
    x_BTD = x_BTD + _attend(build, rms_norm(x_BTD, weights["norm1"], shape), weights, place, window)
    normed = rms_norm(x_BTD, weights["norm2"], shape)
    if "router" in weights:
        return x_BTD + build.mix(build, normed, weights)
    return x_BTD + _gated(build, normed, weights, place)


def rms_norm(x: Array, weight: Array, shape: Shape) -> Array:
    """x over the root of its mean square, times the weight; in float32, then in the format of x."""
    exact = x.astype(jnp.float32)
    scaled = exact * lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + shape.eps)
    factor = weight.astype(jnp.float32)
    return (scaled * (1 + factor if shape.norm_plus_one else factor)).astype(x.dtype)


def dense(
    build: Build, x_BTI: Array, weights: Weights, place: Place, name: str, *, is_transposed: bool = False
) -> Array:
    """The linear layer `name`: matrix, the adapter beside it, bias."""
    out = linear(x_BTI, weights[name], is_transposed)
    if f"{name}.{LEFT}" in weights:
        dropped = drop(x_BTI, place.keys, name, build.rates.adapter)
        narrow = linear(dropped, weights[f"{name}.{RIGHT}"])
        out = out + (build.adapter_scale * linear(narrow, weights[f"{name}.{LEFT}"])).astype(out.dtype)
    return out + weights[f"{name}_bias"].astype(out.dtype) if f"{name}_bias" in weights else out


def _attend(build: Build, x_BTD: Array, weights: Weights, place: Place, window: Array | int) -> Array:
    shape, lead = build.shape, x_BTD.shape[:2]
    through = partial(dense, build, x_BTD, weights, place)
    q = through("q").reshape(*lead, shape.heads, shape.head_dim)
    k = through("k").reshape(*lead, shape.kv_heads, shape.head_dim)
    v = through("v").reshape(*lead, shape.kv_heads, shape.head_dim)
    if shape.q_norm:
        q, k = rms_norm(q, weights["q_norm"], shape), rms_norm(k, weights["k_norm"], shape)
    mixed = build.attend(_rotated(q, place), _rotated(k, place), v, place.segments, window, **_dropping(build, place))
    return dense(build, mixed.reshape(*lead, -1), weights, place, "o")


def _dropping(build: Build, place: Place) -> dict[str, Any]:
    """What attention drops of its shares, as its argument; none where it drops nothing."""
    rate = build.rates.attention
    return {"drop": partial(drop, keys_BT2=place.keys, place="shares", rate=rate)} if rate else {}


def _rotated(x_BTHd: Array, place: Place) -> Array:
    first, second = jnp.split(x_BTHd, 2, axis=-1)
    return x_BTHd * place.cosine + jnp.concatenate([-second, first], axis=-1) * place.sine


def _gated(build: Build, x_BTD: Array, weights: Weights, place: Place) -> Array:
    gate, up = (dense(build, x_BTD, weights, place, name) for name in ("gate", "up"))
    return dense(build, ACTIVATE[build.shape.activation](gate) * up, weights, place, "down")


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """x less its mean, over its standard deviation, times the weight, plus the bias; in float32."""
    exact = x.astype(jnp.float32)
    centred = exact - exact.mean(axis=-1, keepdims=True)
    scaled = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def gpt2_block(build: Build, x_BTD: Array, weights: Weights, place: Place, window: Array | int) -> Array:
    """One layer of GPT-2: learned positions are in its input, matrices lie transposed, everything has a bias."""
    shape, lead, rate = build.shape, x_BTD.shape[:2], build.rates.residual

    def turned(x: Array, name: str) -> Array:
        return dense(build, x, weights, place, name, is_transposed=True)

    normed = layer_norm(x_BTD, weights["norm1"], weights["norm1_bias"], shape.eps)
    parts = jnp.split(turned(normed, "qkv"), 3, axis=-1)
    q, k, v = (part.reshape(*lead, shape.heads, shape.head_dim) for part in parts)
    mixed = build.attend(q, k, v, place.segments, window, **_dropping(build, place)).reshape(*lead, -1)
    x_BTD = x_BTD + drop(turned(mixed, "o"), place.keys, "attention", rate)
    normed = layer_norm(x_BTD, weights["norm2"], weights["norm2_bias"], shape.eps)
    return x_BTD + drop(turned(ACTIVATE[shape.activation](turned(normed, "up")), "down"), place.keys, "unit", rate)
