"""Attention by kernels that JAX ships for TPUs and GPUs, as functions of packs like every other form.

None was run on the device that it is for: here they ran in Pallas's interpreter, where a test holds them to the plain
form. On a device the comparison at the start of a run decides. cuDNN's, behind `jax.nn.dot_product_attention`, is not
among them: it takes lengths of rows and no documents, or a mask of all tokens by all.
"""

# B packs side by side, T tokens, H query heads, G key heads, d numbers of a head

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def splash(q: Array, k: Array, v: Array, segments: Array, window: int, *, is_interpreted: bool = False) -> Array:
    """By TPU kernels that skip what a causal mask or a window hides, and keep documents apart."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, heads = q.shape[1], q.shape[2]
    sees: masks.Mask = masks.CausalMask((tokens, tokens))
    if window < tokens:
        sees = masks.LocalMask((tokens, tokens), (window - 1, 0), 0)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([sees] * heads), head_shards=1, q_seq_shards=1, interpret=is_interpreted
    )

    def of_one(q_THd: Array, k_TGd: Array, v_TGd: Array, segments_T: Array) -> Array:
        scaled = (q_THd * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
        parts = (each.swapaxes(0, 1) for each in (scaled, k_TGd, v_TGd))
        found: Array = attend(*parts, segment_ids=kernel.SegmentIds(segments_T, segments_T))
        return found.swapaxes(0, 1)

    return jax.vmap(of_one)(q, k, v, segments)


def triton(q: Array, k: Array, v: Array, segments: Array, window: int, *, is_interpreted: bool = False) -> Array:
    """By GPU kernels that keep documents apart. Raises ValueError for a window, which they do not have."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    if window < q.shape[1]:
        raise ValueError(f"JAX's kernel for GPUs has no sliding window, and the model one of {window} tokens")
    shared = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(each, shared, axis=2) for each in (k, v))
    found: Array = mha(q, k, v, segments, sm_scale=1 / math.sqrt(q.shape[-1]), causal=True, interpret=is_interpreted)
    return found
