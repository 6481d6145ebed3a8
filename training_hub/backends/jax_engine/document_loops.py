"""Attention within the documents of a pack on a CPU: only the blocks in which tokens see each other are computed.

A block of queries meets, one after another, the blocks of keys from its first token's document on. How many these are
is read from the pack while the program runs, so one program serves every pack of a size, and the work grows with the
squares of documents and not of packs. Shares are kept unnormalised beside their running maximum; backward makes them
again from their logarithms. Sources: Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135.

Scores lie as [heads, keys, queries], because XLA sums and compares along a dimension in vector registers on a CPU only
where that is not the last one: 7 times as fast there as the same in larger blocks with keys last (jaxlib 0.10.2).
"""

# B packs side by side, T tokens, H query heads, G key heads, R = H / G query heads that share one, d numbers of a head
# n blocks of S tokens; Q queries and K keys of one block, both S

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from training_hub.backends.jax_engine.products import KEPT, product

SIZE = 64
"""Tokens of a block: larger ones compute more that nobody sees, smaller ones spend more on starting operations."""

NEVER = -1e30
"""The score of a key that is not seen. Finite, so that the maximum of a row of them can be subtracted from it."""

Window: TypeAlias = Array | int
Kept: TypeAlias = tuple[Array, Array, Array, Array, Window, Array, Array]


def in_loops(q: Array, k: Array, v: Array, segments: Array, window: Window) -> Array:
    """Attention of packs [B, T, ...], whose documents lie in a row each and padding, 0, at the end.

    What padding sees is not what the plain form lets it see: nobody asks.
    """
    segments = jnp.asarray(segments)
    if len(q) == 1:
        return _attend(q[0], k[0], v[0], segments[0], window)[None]
    return lax.map(lambda one: _attend(*one, window), (q, k, v, segments))


@jax.custom_vjp
def _attend(q_THd: Array, k_TGd: Array, v_TGd: Array, segments_T: Array, window: Window) -> Array:
    return _forward(q_THd, k_TGd, v_TGd, segments_T, window)[0]


def _forward(q_THd: Array, k_TGd: Array, v_TGd: Array, segments_T: Array, window: Window) -> tuple[Array, Kept]:
    heads, width, dtype = q_THd.shape[1], q_THd.shape[2], q_THd.dtype
    segments = _cut(segments_T)
    q, k, v = _blocks(q_THd), _blocks(k_TGd, heads), _blocks(v_TGd, heads)
    count, _, size, _ = q.shape
    first, _ = _spans(segments, window)

    def of_queries(number: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        def of_keys(other: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest_HQ, total_HQ, mixed_HQd = running
            scores_HKQ = _scores(q[number], k[other], segments, number, other, window)
            new_HQ = jnp.maximum(largest_HQ, scores_HKQ.max(axis=1))
            shares_HKQ, shrunk_HQ = jnp.exp(scores_HKQ - new_HQ[:, None]), jnp.exp(largest_HQ - new_HQ)
            more_HQd = product("hkq,hkd->hqd", shares_HKQ.astype(dtype), v[other])
            return new_HQ, total_HQ * shrunk_HQ + shares_HKQ.sum(axis=1), mixed_HQd * shrunk_HQ[..., None] + more_HQd

        nothing = (jnp.full((heads, size), NEVER), jnp.zeros((heads, size)), jnp.zeros((heads, size, width)))
        largest_HQ, total_HQ, mixed_HQd = lax.fori_loop(first[number], number + 1, of_keys, nothing)
        found = (mixed_HQd / total_HQ[..., None]).astype(dtype), largest_HQ + jnp.log(total_HQ)
        return _put(so_far[0], found[0], number), _put(so_far[1], found[1], number)

    empty = (jnp.zeros(q.shape, dtype), jnp.zeros((count, heads, size)))
    mixed, logs = checkpoint_name(lax.fori_loop(0, count, of_queries, empty), KEPT)
    return _laid_out(mixed, len(q_THd)), (q_THd, k_TGd, v_TGd, segments_T, window, mixed, logs)


def _backward(kept: Kept, gradient_THd: Array) -> tuple[Array, Array, Array, None, None]:
    q_THd, k_TGd, v_TGd, segments_T, window, mixed, logs = kept
    heads, width, dtype = q_THd.shape[1], q_THd.shape[2], q_THd.dtype
    segments = _cut(segments_T)
    q, k, v = _blocks(q_THd), _blocks(k_TGd, heads), _blocks(v_TGd, heads)
    gradient = _blocks(gradient_THd)
    count, _, size, _ = q.shape
    _, last = _spans(segments, window)
    # The sum over keys of share times gradient of share, without making either.
    meant = (gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1)

    def of_keys(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        def of_queries(other: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            to_q, to_k_HKd, to_v_HKd = running
            scores_HKQ = _scores(q[other], k[number], segments, other, number, window)
            shares_HKQ = jnp.exp(scores_HKQ - logs[other][:, None])
            to_shares_HKQ = product("hkd,hqd->hkq", v[number], gradient[other])
            to_scores_HKQ = (shares_HKQ * (to_shares_HKQ - meant[other][:, None])).astype(dtype)
            to_v_HKd += product("hkq,hqd->hkd", shares_HKQ.astype(dtype), gradient[other])
            to_k_HKd += product("hkq,hqd->hkd", to_scores_HKQ, q[other])
            to_q = _put(to_q, to_q[other] + product("hkq,hkd->hqd", to_scores_HKQ, k[number]), other)
            return to_q, to_k_HKd, to_v_HKd

        none_HKd = jnp.zeros((heads, size, width))
        to_q, to_k_HKd, to_v_HKd = lax.fori_loop(number, last[number] + 1, of_queries, (so_far[0], none_HKd, none_HKd))
        return to_q, _put(so_far[1], to_k_HKd, number), _put(so_far[2], to_v_HKd, number)

    to_q, to_k, to_v = lax.fori_loop(0, count, of_keys, (jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape)))
    scale, groups, tokens = 1 / math.sqrt(width), k_TGd.shape[1], len(q_THd)
    to_k, to_v = (each.reshape(count, groups, -1, size, width).sum(axis=2) for each in (to_k * scale, to_v))
    found = [_laid_out(each, tokens).astype(dtype) for each in (to_q * scale, to_k, to_v)]
    return found[0], found[1], found[2], None, None


_attend.defvjp(_forward, _backward)


def _scores(q_HQd: Array, k_HKd: Array, segments: Array, queries: Array, keys: Array, window: Window) -> Array:
    """[H, K, Q] float32: the scores of two blocks, of these numbers, NEVER where a query does not see a key."""
    size = q_HQd.shape[1]
    scores_HKQ = product("hkd,hqd->hkq", k_HKd, q_HQd) / math.sqrt(q_HQd.shape[2])
    query, key = jnp.arange(size)[None] + queries * size, jnp.arange(size)[:, None] + keys * size
    sees_KQ = (key <= query) & (query - key < window) & (segments[keys][:, None] == segments[queries][None])
    return jnp.where(sees_KQ, scores_HKQ, NEVER)


def _spans(segments: Array, window: Window) -> tuple[Array, Array]:
    """[n] twice: the first block of keys that queries of each block see, and the last of queries that see its keys."""
    count, size = segments.shape
    flat, start = segments.reshape(-1), jnp.arange(count) * size
    order = jnp.where(flat > 0, flat, jnp.iinfo(jnp.int32).max)
    begins = jnp.searchsorted(order, order[start], side="left")
    ends = jnp.searchsorted(order, order[start + size - 1], side="right") - 1
    first = jnp.maximum(begins, start - window + 1) // size
    last = jnp.minimum(ends, start + size - 1 + window - 1) // size
    # Padding meets its own block alone, so that it costs next to nothing and divides by something.
    own = jnp.arange(count)
    first = jnp.where(segments[:, 0] > 0, first, own)
    return first.astype(jnp.int32), jnp.where(segments[:, -1] > 0, last, own).astype(jnp.int32)


def _cut(each: Array) -> Array:
    """[n, S, ...]: tokens [T, ...] in blocks; zeros are added where they do not fill the last."""
    size = min(SIZE, len(each))
    rest = -len(each) % size
    padded = jnp.pad(each, [(0, rest), *((0, 0) for _ in each.shape[1:])]) if rest else each
    return padded.reshape(-1, size, *each.shape[1:])


def _blocks(each: Array, heads: int | None = None) -> Array:
    """[n, H, S, d]: tokens [T, H, d] in blocks, each of their heads given to all query heads that share it."""
    cut = _cut(each).transpose(0, 2, 1, 3)
    return cut if heads in (None, cut.shape[1]) else jnp.repeat(cut, heads // cut.shape[1], axis=1)


def _laid_out(blocks: Array, tokens: int) -> Array:
    """[T, H, d] of blocks [n, H, S, d]."""
    return blocks.transpose(0, 2, 1, 3).reshape(-1, blocks.shape[1], blocks.shape[3])[:tokens]


def _put(array: Array, one: Array, number: Array) -> Array:
    return lax.dynamic_update_index_in_dim(array, one, number, 0)
