"""What is drawn at random in training: dropout, and noise on the embeddings (NEFTune, arXiv:2310.05914).

Numbers are drawn for each token by itself, from the seed of the run, the step, the number of the token's sample and its
place in it, and where in the model they are used. So they are the same however samples are packed, on whatever devices,
and after a stop. Only dropout of attention's shares also depends on where in its pack a sample lies.
"""

# B packs side by side, T tokens, D width

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from training_hub.backends.jax_engine.processes import placed
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.recipe import Recipe
from training_hub.types import Pack

GENERATOR = "threefry2x32"
"""Named, since a user of JAX may have chosen another, whose keys have another size."""


@dataclass(frozen=True)
class Rates:
    """Shares of numbers that are dropped: of embeddings, of attention's shares, of what attention and the unit behind
    it add, of what goes into an adapter. alpha: of the noise on embeddings."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0
    adapter: float = 0.0
    alpha: float = 0.0

    @staticmethod
    def of(recipe: Recipe, shape: Shape, adapter: float) -> Rates:
        """What the model's config, the recipe and its adapter say."""
        dropouts = (shape.embedding_dropout, shape.attention_dropout, shape.residual_dropout)
        return Rates(*dropouts, adapter, recipe.loss.neftune_noise_alpha)

    @property
    def is_any(self) -> bool:
        return self != NOTHING


NOTHING = Rates()


@dataclass(frozen=True)
class Noise:
    """What the random numbers of a batch come from.

    key [2] uint32: of seed and step. samples, lengths [B, T] int32: the number of each token's sample, and its tokens.
    """

    key: np.ndarray
    samples: np.ndarray
    lengths: np.ndarray


jax.tree_util.register_dataclass(Noise, ["key", "samples", "lengths"], [])


def noise_of(packs: Sequence[Pack], positions_BT: Array, seed: int, step: int) -> Noise:
    """The noise of packs that lie side by side in arrays of this shape, where these lie."""
    samples, lengths = np.zeros(positions_BT.shape, np.int32), np.ones(positions_BT.shape, np.int32)
    for row, pack in enumerate(packs):
        own = np.diff(pack.boundaries)
        samples[row, : len(pack)] = np.repeat(pack.samples, own)
        lengths[row, : len(pack)] = np.repeat(own, own)
    key = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    return Noise(key, *(placed(each, positions_BT.sharding) for each in (samples, lengths)))


def token_keys(noise: Noise, positions_BT: Array) -> Array:
    """[B, T, 2] uint32: a key for each token."""
    first = jax.random.wrap_key_data(noise.key, impl=GENERATOR)

    def one(sample: Array, position: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(first, sample), position))

    return jax.vmap(jax.vmap(one))(noise.samples, positions_BT)


def folded(keys_BT2: Array, number: Array | int) -> Array:
    """Other keys for each token, by a number: that of the layer, or of a place in the model."""

    def one(data: Array) -> Array:
        key = jax.random.wrap_key_data(data, impl=GENERATOR)
        return jax.random.key_data(jax.random.fold_in(key, number))

    return jax.vmap(jax.vmap(one))(keys_BT2)


def drop(x_BTX: Array, keys_BT2: Array | None, place: str, rate: float) -> Array:
    """x [B, T, ...] with each number 0 by the chance `rate`, and the others divided by 1 - rate; as it is without keys.

    place: where in the model or its layer, by name; each has numbers of its own.
    """
    if keys_BT2 is None or not rate:
        return x_BTX

    def stays(data: Array) -> Array:
        return jax.random.bernoulli(jax.random.wrap_key_data(data, impl=GENERATOR), 1 - rate, x_BTX.shape[2:])

    kept = jax.vmap(jax.vmap(stays))(folded(keys_BT2, _number(place)))
    return jnp.where(kept, x_BTX / (1 - rate), 0).astype(x_BTX.dtype)


def disturbed(embedded_BTD: Array, keys_BT2: Array | None, lengths_BT: Array, alpha: float) -> Array:
    """Embeddings, and in training on each number a uniform one of at most alpha / sqrt(tokens of the sample x D)."""
    if keys_BT2 is None or not alpha:
        return embedded_BTD
    width = embedded_BTD.shape[-1]

    def drawn(data: Array) -> Array:
        key = jax.random.wrap_key_data(data, impl=GENERATOR)
        return jax.random.uniform(key, (width,), minval=-1.0, maxval=1.0)

    noise_BTD = jax.vmap(jax.vmap(drawn))(folded(keys_BT2, _number("neftune")))
    bound_BT1 = alpha * lax.rsqrt(lengths_BT.astype(jnp.float32) * width)[..., None]
    return (embedded_BTD + noise_BTD * bound_BT1).astype(embedded_BTD.dtype)


def _number(place: str) -> int:
    return zlib.crc32(place.encode()) >> 1  # 31 bits, which every integer of JAX holds
