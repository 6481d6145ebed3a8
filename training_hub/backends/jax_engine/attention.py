"""Attention within the documents of a pack: which form of it a run takes, and the two that run on every device.

A pack holds many short documents, and a mask of all its tokens by all its tokens would be nearly empty. In blocks, each
query sees its own block of keys and as many before it as a document can span. Both are fixed for a run, so every pack
of one size is one compiled program. On a CPU loops over what there is (`document_loops`) are faster, on other devices
kernels (`kernels`) should be.
"""

# B packs side by side, T tokens, H query heads, G key heads, R = H / G query heads that share one, d numbers of a head
# n blocks of Q queries, K keys that a block sees

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from training_hub.backends.jax_engine import kernels
from training_hub.backends.jax_engine.document_loops import in_loops
from training_hub.backends.jax_engine.products import ein
from training_hub.types import Proof

BLOCK = 128
"""Queries taken together."""

FAR = 2**30
"""A window that reaches back over everything."""

SAME = {"float32": 2e-6, "bfloat16": 2e-2}
"""Difference from the plain form, as a share of the largest number, that another order of sums explains."""

Drop = Callable[[Array], Array]

Attend = Callable[..., Array]
"""(q [B, T, H, d], k and v [B, T, G, d], segments [B, T], window) -> [B, T, H, d]; `drop`, where it is given, is what
drops shares of [B, T, ...] in training."""


def plainly(q: Array, k: Array, v: Array, segments: Array, window: Array | int, *, drop: Drop | None = None) -> Array:
    """The reference: every query against every key, those of other documents and later ones masked."""
    tokens, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    k, v = (jnp.repeat(each, heads // groups, axis=2) for each in (k, v))
    scores = ein("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    places = jnp.arange(tokens)
    sees = _sees(places[:, None], places[None, :], window) & (segments[:, :, None] == segments[:, None, :])
    shares = jax.nn.softmax(jnp.where(sees[:, None], scores, -jnp.inf), axis=-1)
    if drop is not None:
        shares = jnp.moveaxis(drop(jnp.moveaxis(shares, 2, 1)), 1, 2)
    return ein("bhqk,bkhd->bqhd", shares.astype(q.dtype), v).astype(q.dtype)


def in_blocks(
    q: Array, k: Array, v: Array, segments: Array, window: Array | int, *, reach: int, drop: Drop | None = None
) -> Array:
    """The same where no document has more than `reach` tokens. T is a multiple of the block, or less than one."""
    batch, tokens, heads, width = q.shape
    size, groups = min(BLOCK, tokens), k.shape[2]
    count, back = tokens // size, min(-(-(reach - 1) // size), tokens // size - 1)
    keys = size * (back + 1)
    # [B, n, G, R Q, d]: the query heads that share keys are rows of one product.
    folded = q.reshape(batch, count, size, groups, heads // groups, width).transpose(0, 1, 3, 4, 2, 5)
    folded = folded.reshape(batch, count, groups, -1, width)
    seen_k, seen_v = (_seen(each, count, size, back).transpose(0, 1, 3, 2, 4) for each in (k, v))
    scores = ein("bngqd,bngkd->bngqk", folded, seen_k) / math.sqrt(width)
    scores = scores.reshape(batch, count, groups, heads // groups, size, keys)
    own = segments.reshape(batch, count, size)
    seen = _seen(segments, count, size, back, filler=-1)
    near = _sees(jnp.arange(size)[:, None] + size * back, jnp.arange(keys)[None, :], window)
    sees = near & (own[..., :, None] == seen[..., None, :])
    shares = jax.nn.softmax(jnp.where(sees[:, :, None, None], scores, -jnp.inf), axis=-1).astype(q.dtype)
    if drop is not None:
        by_query = jnp.moveaxis(shares, 4, 2)
        dropped = drop(by_query.reshape(batch, tokens, *by_query.shape[3:]))
        shares = jnp.moveaxis(dropped.reshape(by_query.shape), 2, 4)
    mixed = ein("bngqk,bngkd->bngqd", shares.reshape(batch, count, groups, -1, keys), seen_v)
    mixed = mixed.astype(q.dtype).reshape(batch, count, groups, heads // groups, size, width)
    return mixed.transpose(0, 1, 4, 2, 3, 5).reshape(batch, tokens, heads, width)


def _sees(query: Array, key: Array, window: Array | int) -> Array:
    return (key <= query) & (query - key < window)


def _seen(each: Array, count: int, size: int, back: int, filler: int = 0) -> Array:
    """[B, n, K, ...]: for each block of `each` [B, T, ...] itself and the `back` blocks before it."""
    blocks = each.reshape(each.shape[0], count, size, *each.shape[2:])
    before = [(0, 0), (back, 0), *((0, 0) for _ in blocks.shape[2:])]
    padded = jnp.pad(blocks, before, constant_values=filler)
    return jnp.concatenate([padded[:, place : place + count] for place in range(back + 1)], axis=2)


@dataclass(frozen=True)
class Attention:
    """How a run attends: which function, and what was found when it was tried."""

    name: str
    attend: Attend
    proof: Proof


@dataclass(frozen=True)
class Heads:
    """What attention is about: query heads, key heads, numbers of a head, and how far back each layer sees (0: all)."""

    queries: int
    keys: int
    width: int
    windows: tuple[int, ...] = (0,)


WAYS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("loops", "blocks"),
    "gpu": ("triton", "blocks"),
    "tpu": ("splash", "blocks"),
}
"""What is tried on each platform, the fastest first. Blocks run everywhere; plain is what is left."""

OF_FIXED_WINDOWS = ("triton", "splash")
"""What is compiled for one window, and so is for models whose layers all see equally far."""


def choose(heads: Heads, reach: int, dtype: str, platform: str = "cpu", only_blocks: bool = False) -> Attention:
    """The fastest form that gives what the plain one gives on a packed batch, forward and backward; else the plain.

    Whatever the device and its libraries do, a run never trains by attention that was not compared there first.
    reach: tokens of the longest document. only_blocks: try nothing else, as over several devices, where XLA divides
    blocks by itself.
    """
    ways: dict[str, Attend] = {
        "loops": in_loops,
        "blocks": partial(in_blocks, reach=reach),
        "triton": kernels.triton,
        "splash": kernels.splash,
    }
    name, allowed = "attention is the plain one", f"{SAME[dtype]:.0e}"
    fallen: list[str] = []
    for way in ("blocks",) if only_blocks else WAYS[platform]:
        if way in OF_FIXED_WINDOWS and len(set(heads.windows)) > 1:
            continue
        found = _tried(ways[way], heads, reach, dtype)
        if isinstance(found, float) and found <= SAME[dtype]:
            proof = Proof(name, "fallback" if fallen else "holds", f"{found:.1e}", allowed, "; ".join(fallen))
            return Attention(way, ways[way], proof)
        fallen.append(f"{way}: {found:.1e}" if isinstance(found, float) else f"{way}: {found}")
    remedy = f"{'; '.join(fallen)}. Each token is compared with all of its pack, which is slower and right."
    return Attention("plain", plainly, Proof(name, "fallback", fallen[-1].partition(": ")[2], allowed, remedy))


def _tried(fast: Attend, heads: Heads, reach: int, dtype: str) -> float | str:
    """The largest difference from the plain form over the model's windows, or why the form does not run here."""
    try:
        return max(_difference(fast, heads, window or FAR, reach, dtype) for window in set(heads.windows))
    except Exception as error:  # whatever a kernel meets on a device that it was not made for; the run says it
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _difference(fast: Attend, heads: Heads, window: int, reach: int, dtype: str) -> float:
    """The largest relative difference from the plain form, of results and of gradients, on a batch of documents."""
    tokens = 3 * BLOCK
    random = np.random.default_rng(0)
    shapes = [(1, tokens, count, heads.width) for count in (heads.queries, heads.keys, heads.keys, heads.queries)]
    q, k, v, cotangent = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    segments = jnp.asarray(_documents(tokens, reach, random))[None]

    def both(attend: Attend, q: Array, k: Array, v: Array, cotangent: Array, segments: Array) -> list[Array]:
        is_real = (segments > 0)[:, :, None, None]  # what padding sees is nobody's
        out, back = jax.vjp(lambda *each: jnp.where(is_real, attend(*each, segments, window), 0), q, k, v)
        return [out, *back(cotangent)]

    # As arguments, since XLA would compute at length what it knows beforehand.
    ours, plain = (jax.jit(partial(both, form))(q, k, v, cotangent, segments) for form in (fast, plainly))
    pairs = zip(ours, plain, strict=True)
    return max(_relative(np.asarray(one, np.float32), np.asarray(other, np.float32)) for one, other in pairs)


def _documents(tokens: int, reach: int, random: np.random.Generator) -> np.ndarray:
    """Numbers of documents of up to `reach` tokens, the first of them as long as that, and padding at the end."""
    segments, start, number = np.zeros(tokens, np.int32), 0, 1
    longest = min(reach, tokens - 8)
    while start < tokens - 8:
        length = longest if number == 1 else int(random.integers(1, longest + 1))
        segments[start : min(start + length, tokens - 8)] = number
        start, number = start + length, number + 1
    return segments


def _relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / max(float(np.abs(other).max()), 1e-30))
