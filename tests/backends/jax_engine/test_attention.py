"""Attention in blocks is the plain one, and one that is not is found out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training_hub.backends.jax_engine import attention
from training_hub.backends.jax_engine.attention import FAR, choose, in_blocks, plainly


@pytest.mark.parametrize("reach, window", [(300, 50), (129, FAR)])
def test_blocks_see_what_the_plain_form_sees(reach, window):
    """Forward and backward within 2e-6 of the largest number: sums in another order, in float32."""
    random = np.random.default_rng(1)
    q, k, v = (jnp.asarray(random.standard_normal((2, 512, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ends = np.concatenate([np.full(length, number + 1) for number, length in enumerate((reach, 100, 60, 20))])
    segments = np.zeros((2, 512), np.int32)
    segments[:, : len(ends)] = ends[:512]

    def both(attend):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.asarray(segments), window), q, k, v)
        return [out, *back(jnp.cos(out))]

    ours, wanted = jax.jit(lambda: both(partial(in_blocks, reach=reach)))(), jax.jit(lambda: both(plainly))()
    for one, other in zip(ours, wanted, strict=True):
        assert jnp.abs(one - other).max() <= 2e-6 * jnp.abs(other).max()


def test_attention_that_mixes_documents_is_found_out_and_not_used(monkeypatch):
    def mixing(q, k, v, segments, window, *, reach):
        return in_blocks(q, k, v, jnp.zeros_like(segments), window, reach=q.shape[1])

    assert choose(4, 2, 8, 20, "float32").name == "blocks"
    monkeypatch.setattr(attention, "in_blocks", mixing)
    chosen = choose(4, 2, 8, 20, "float32")
    assert chosen.name == "plain" and chosen.proof.status == "fallback"
