"""Every form of attention is the plain one, and one that is not is found out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training_hub.backends.jax_engine import attention, kernels
from training_hub.backends.jax_engine.attention import FAR, Heads, choose, in_blocks, plainly
from training_hub.backends.jax_engine.document_loops import SIZE, _spans, in_loops

LLAMA = Heads(4, 2, 8)


def packs(lengths: list[int], tokens: int, width: int = 8, batch: int = 1) -> list[jax.Array]:
    """Queries of four heads, keys and values of two, and the numbers of documents of these lengths."""
    random = np.random.default_rng(1)
    shapes = ((batch, tokens, heads, width) for heads in (4, 2, 2))
    q, k, v = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    ends = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments = np.zeros((batch, tokens), np.int32)
    segments[:, : len(ends)] = ends[:tokens]
    segments[1:, 100:] = 0  # another pack beside the first is shorter
    return [q, k, v, jnp.asarray(segments)]


def apart(attend, q, k, v, segments, window) -> list[float]:
    """Differences from the plain form, of the result and of all gradients, as shares of the largest number."""

    def both(form, q, k, v, segments):
        is_real = (segments > 0)[:, :, None, None]
        out, back = jax.vjp(lambda *each: jnp.where(is_real, form(*each, segments, window), 0), q, k, v)
        return [out, *back(jnp.cos(out))]

    pairs = zip(*(jax.jit(partial(both, form))(q, k, v, segments) for form in (attend, plainly)), strict=True)
    return [float(jnp.abs(one - other).max() / jnp.abs(other).max()) for one, other in pairs]


@pytest.mark.parametrize("reach, window", [(300, 50), (129, FAR)])
def test_blocks_and_loops_see_what_the_plain_form_sees(reach, window):
    """Forward and backward within 2e-6 of the largest number: sums in another order, in float32."""
    given = packs([reach, 100, 60, 20], 512, batch=2)
    assert max(apart(partial(in_blocks, reach=reach), *given, window)) <= 2e-6
    assert max(apart(in_loops, *given, window)) <= 2e-6


def test_loops_take_packs_that_fill_no_block():
    """The last of three blocks is not full; to 2e-6, as above."""
    assert max(apart(in_loops, *packs([64, 1, 70], 150), 64)) <= 2e-6


def test_loops_work_on_blocks_of_documents_and_not_on_all_of_a_pack():
    """Pairs of blocks: of documents as long as a block, of one document with and without a window, and of padding."""
    spans = jax.jit(_spans)

    def pairs(segments: np.ndarray, window: int = FAR) -> list[int]:
        first, last = (np.asarray(each) for each in spans(segments.reshape(16, SIZE).astype(np.int32), window))
        return [int((np.arange(16) - first + 1).sum()), int((last - np.arange(16) + 1).sum())]

    assert pairs(np.repeat(np.arange(1, 17), SIZE)) == [16, 16]
    assert pairs(np.ones(16 * SIZE)) == [16 * 17 // 2] * 2
    assert pairs(np.ones(16 * SIZE), window=2) == [2 * 16 - 1] * 2
    assert pairs(np.zeros(16 * SIZE)) == [16, 16]


@pytest.mark.parametrize("kernel, window", [(kernels.splash, 50), (kernels.triton, FAR)])
def test_kernels_see_what_the_plain_form_sees(kernel, window):
    """In Pallas's interpreter, which says what a kernel computes and nothing of its device; to 2e-6, as above."""
    given = packs([90, 80, 30], 256, width=64)
    assert max(apart(partial(kernel, is_interpreted=True), *given, window)) <= 2e-6


def test_attention_that_mixes_documents_is_found_out_and_not_used(monkeypatch):
    def mixing(q, k, v, segments, window):
        return in_loops(q, k, v, jnp.ones_like(segments), window)

    assert choose(LLAMA, 20, "float32").name == "loops"
    monkeypatch.setattr(attention, "in_loops", mixing)
    chosen = choose(LLAMA, 20, "float32")
    assert chosen.name == "blocks" and chosen.proof.status == "fallback" and "loops" in chosen.proof.remedy
    monkeypatch.setattr(attention, "in_blocks", lambda *given, reach: mixing(*given))
    chosen = choose(LLAMA, 20, "float32")
    assert chosen.name == "plain" and chosen.proof.status == "fallback"


def test_a_kernel_that_does_not_run_here_is_passed_over_in_words():
    """This processor is no TPU, so splash cannot be compiled; blocks can."""
    chosen = choose(Heads(4, 2, 64), 20, "float32", platform="tpu")
    assert chosen.name == "blocks" and chosen.proof.status == "fallback" and "splash: " in chosen.proof.remedy
    assert choose(Heads(4, 2, 64, (0, 32)), 20, "float32", platform="tpu").proof.status == "holds"  # nothing to try
