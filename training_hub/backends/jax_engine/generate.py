"""What a model says, token by token: the likeliest each time, or drawn; keys and values of what was read are kept.

Prompts are padded at their ends. A token's keys and values are kept at the place of its position, and a query sees the
places up to its own, so that what was written for padding is written over before anything sees it.
"""

# B rows, T tokens read at once, S places, H query heads, G key heads, R = H / G, d numbers of a head, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from training_hub.backends.jax_engine.forward import Forward
from training_hub.backends.jax_engine.noise import GENERATOR
from training_hub.backends.jax_engine.processes import whole
from training_hub.backends.jax_engine.products import ein
from training_hub.backends.jax_engine.step import Merge, Tree
from training_hub.backends.shared.answers import TOKENS_AT_ONCE, Advance, Answer, Decoding, Prompt, batches, cut
from training_hub.backends.shared.materials import Limits

Kept = list[tuple[Array, Array]]
"""The keys and values [B, S, G, d] of each layer."""

MOST_AT_ONCE = 256
"""Tokens of each prompt that are read at once: a long one is read in parts."""

LEAST = {"places": 64, "tokens": 16}
"""Sizes are powers of two from here on, so that few programs are compiled."""

Lay = Callable[[np.ndarray], Array]

Hear = Callable[[np.ndarray, np.ndarray], None]
"""Told of the next token of each row [B], and which rows these tokens belong to the answer of [B]."""


class Speech:
    """The compiled functions by which a model answers.

    limits: what it can read. merge: the model's weights, from what trains and what stays. lay: puts what each row has
    on the devices; where these are of several processes, all call the same in the same order.
    """

    def __init__(self, forward: Forward, limits: Limits, merge: Merge = dict, lay: Lay = jnp.asarray):
        self.limits, self._lay = limits, lay
        self.forward = replace(forward, forget="none", is_scanned=False)
        self._read = jax.jit(partial(_read, self.forward, merge), donate_argnums=(2,))
        self._choose = jax.jit(_choose, static_argnames=("temperature", "top_p"))

    def answers(
        self,
        weights: tuple[Tree, Tree],
        prompts: Sequence[Prompt],
        decoding: Decoding,
        tokens_at_once: int = TOKENS_AT_ONCE,
        advance: Advance = lambda count: None,
    ) -> list[Answer]:
        """One answer to each prompt, in their order; `advance` is told of each that is done.

        weights: what trains and what stays. Equal prompts are asked once where nothing is drawn. What is drawn for a
        prompt follows from the seed and the number of the prompt, however prompts are asked together.
        """
        found: dict[int, Answer] = {}
        for group in batches(prompts, tokens_at_once, merges=decoding.temperature == 0):
            numbers = [places[0] for places in group]
            given = self.together(weights, [prompts[number] for number in numbers], decoding, numbers)
            for places, answer in zip(group, given, strict=True):
                found.update(dict.fromkeys(places, answer))
                advance(len(places))
        return [found[number] for number in range(len(prompts))]

    def together(
        self,
        weights: tuple[Tree, Tree],
        asked: Sequence[Prompt],
        decoding: Decoding,
        numbers: Sequence[int],
        hear: Hear = lambda tokens, goes_on: None,
    ) -> list[Answer]:
        """The answers to prompts that are asked at once; `hear` is told of each token as it is made."""
        count = _power(len(asked))
        lengths = np.array([len(one.ids) for one in asked] + [1] * (count - len(asked)))
        limits = np.array([one.limit for one in asked] + [0] * (count - len(asked)))
        draws = self._lay(_draws(decoding, [*numbers, *[0] * (count - len(asked))]))
        logits_BV, kept = self._prompts(weights, asked, lengths, int(limits.max()))
        goes_on, said = limits > 0, []
        for step in range(int(limits.max())):
            positions = (lengths + step).astype(np.int32)
            how = {"temperature": decoding.temperature, "top_p": decoding.top_p}
            said.append(whole(self._choose(logits_BV, draws, self._lay(positions), **how)))
            goes_on = goes_on & ~np.isin(said[-1], decoding.stop_ids)
            hear(said[-1], goes_on)
            goes_on = goes_on & (step + 1 < limits)
            if not goes_on.any():
                break
            read = said[-1][:, None], positions[:, None], np.zeros(count, np.int32)
            logits_BV, kept = self._read(*weights, kept, *map(self._lay, read))
        rows = np.stack(said, axis=1) if said else np.zeros((count, 0), int)
        return [cut(row[: one.limit].tolist(), decoding) for row, one in zip(rows, asked, strict=False)]

    def _prompts(
        self, weights: tuple[Tree, Tree], asked: Sequence[Prompt], lengths: np.ndarray, limit: int
    ) -> tuple[Array, Kept]:
        """The logits behind each prompt, and what is kept of them with room for answers of `limit` tokens."""
        longest = int(lengths.max())
        width = min(MOST_AT_ONCE, _power(longest, LEAST["tokens"]))
        parts = -(-longest // width)
        ids = np.zeros((len(lengths), parts * width), np.int32)
        for row, one in enumerate(asked):
            ids[row, : len(one.ids)] = one.ids
        kept = self._nothing(len(lengths), _power(max(longest + limit, parts * width), LEAST["places"]))
        logits_BV = self._lay(np.zeros((len(lengths), self.forward.build.shape.vocabulary), np.float32))
        for start in range(0, parts * width, width):
            positions = np.broadcast_to(np.arange(start, start + width, dtype=np.int32), (len(lengths), width))
            last = np.clip(lengths - 1 - start, 0, width - 1)
            read = ids[:, start : start + width], positions, last
            found, kept = self._read(*weights, kept, *map(self._lay, read))
            is_last = self._lay(((lengths - 1) // width == start // width)[:, None])
            logits_BV = jnp.where(is_last, found, logits_BV)
        return logits_BV, kept

    def _nothing(self, rows: int, places: int) -> Kept:
        build, shape = self.forward.build, self.forward.build.shape
        zeros = np.zeros((rows, places, shape.kv_heads, shape.head_dim), build.dtype)
        empty = [self._lay(zeros) for _ in range(2 * shape.layers)]
        return list(zip(empty[::2], empty[1::2], strict=True))


def _read(
    forward: Forward,
    merge: Merge,
    trained: Tree,
    frozen: Tree,
    kept: Kept,
    ids_BT: Array,
    places_BT: Array,
    last_B: Array,
) -> tuple[Array, Kept]:
    """The logits [B, V] behind one token of each row, and keys and values with those of these tokens among them."""
    params, rows = merge({**frozen, **trained}), jnp.arange(len(ids_BT))
    before, after = iter(kept), []

    def attend(q: Array, k: Array, v: Array, segments: Array, window: Array | int) -> Array:
        # Layers are laid out, so that this is called once for each of them, in order, while the program is made.
        keys, values = (
            one.at[rows[:, None], places_BT].set(own) for one, own in zip(next(before), (k, v), strict=True)
        )
        after.append((keys, values))
        return _attend(q, keys, values, places_BT, window)

    speaking = replace(forward, build=replace(forward.build, attend=attend))
    hidden_BTD = speaking.hidden(params, ids_BT, places_BT, jnp.ones_like(ids_BT))
    return ein("bd,vd->bv", hidden_BTD[rows, last_B], params[forward.head]), after


def _attend(q: Array, keys: Array, values: Array, places_BT: Array, window: Array | int) -> Array:
    """[B, T, H, d]: each query at its place, with the keys of places up to it."""
    batch, tokens, heads, width = q.shape
    groups, places = keys.shape[2], jnp.arange(keys.shape[1])
    folded = q.reshape(batch, tokens, groups, heads // groups, width)
    scores = ein("btgrd,bsgd->bgrts", folded, keys) / math.sqrt(width)
    own = places_BT[:, None, None, :, None]
    sees = (places <= own) & (own - places < window)
    shares = jax.nn.softmax(jnp.where(sees, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return ein("bgrts,bsgd->btgrd", shares, values).astype(q.dtype).reshape(q.shape)


def _choose(logits_BV: Array, draws_B2: Array, positions_B: Array, temperature: float, top_p: float) -> Array:
    """[B] the next token of each row: the likeliest, or one drawn from the keys of the rows and their positions."""
    if not temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / temperature
    if top_p < 1:
        falling_BV = -jnp.sort(-scaled_BV, axis=-1)
        shares_BV = jax.nn.softmax(falling_BV, axis=-1)
        # A token stays where those before it hold less than top_p: the likeliest always does.
        stays_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV < top_p
        least_B = jnp.min(jnp.where(stays_BV, falling_BV, jnp.inf), axis=-1)
        scaled_BV = jnp.where(scaled_BV < least_B[:, None], -jnp.inf, scaled_BV)

    def one(data: Array, position: Array, scaled_V: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=GENERATOR), position)
        return jax.random.categorical(key, scaled_V).astype(jnp.int32)

    return jax.vmap(one)(draws_B2, positions_B, scaled_BV)


def _draws(decoding: Decoding, numbers: Sequence[int]) -> np.ndarray:
    """[B, 2] uint32: what is drawn from for each prompt."""
    states = [np.random.SeedSequence([decoding.seed, number]).generate_state(2, np.uint32) for number in numbers]
    return np.stack(states)


def _power(count: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (count - 1).bit_length())
