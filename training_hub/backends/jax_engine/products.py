"""Products of 16-bit numbers whose sums are kept in 32 bits, forward and backward.

XLA's own rule would sum and round in bfloat16, and in backward multiply float32 by bfloat16. On a CPU with matrix units
that is five times slower than bfloat16 x bfloat16 -> float32 (measured with jaxlib 0.10.2); everywhere it loses digits.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"
"""The name of what layers keep for backward where they forget selectively: results of products and of attention."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ein(spec: str, left: Array, right: Array) -> Array:
    """The einsum of two arrays, multiplied in the format of `left` and summed in float32, which the result is in.

    Each letter of the spec is in two of its three parts. The gradient of `right` is in its own format, not rounded to
    that of `left`: weights may be float32 masters.
    """
    return product(spec, left, right.astype(left.dtype))


def _forward(spec: str, left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    return ein(spec, left, right), (left, right)


def _backward(spec: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    left, right = kept
    inputs, out = spec.split("->")
    one, other = inputs.split(",")
    gradient = gradient.astype(left.dtype)
    to_left = product(f"{out},{other}->{one}", gradient, right.astype(left.dtype))
    to_right = product(f"{out},{one}->{other}", gradient, left)
    return to_left.astype(left.dtype), to_right.astype(right.dtype)


ein.defvjp(_forward, _backward)


def product(spec: str, left: Array, right: Array) -> Array:
    """The einsum of two arrays of one format, summed in float32; its gradient is JAX's own."""
    # Without this float32 would be multiplied in fewer bits on a TPU and on GPUs with TF32.
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    if left.dtype == jnp.float32:
        spec, left, right = _without_ones(spec, left, right)
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32, precision=precision)


def _without_ones(spec: str, left: Array, right: Array) -> tuple[str, Array, Array]:
    """The same sum without the letters that it runs over once.

    On a CPU the gradient of a weight, "bto,bti->oi", is twice as fast in float32 without a b of 1, and half as fast in
    bfloat16, whose kernels want three dimensions (jaxlib 0.10.2).
    """
    inputs, out = spec.split("->")
    one, other = inputs.split(",")
    for letter in set(one) & set(other) - set(out):
        if left.shape[one.index(letter)] == 1:
            left, right = left.squeeze(one.index(letter)), right.squeeze(other.index(letter))
            one, other = one.replace(letter, ""), other.replace(letter, "")
    return f"{one},{other}->{out}", left, right


def linear(x_BTI: Array, weight: Array, is_transposed: bool = False) -> Array:
    """[B, T, O] in the format of x: x times a weight that lies as [O, I], or transposed as [I, O]."""
    spec = "bti,io->bto" if is_transposed else "bti,oi->bto"
    return checkpoint_name(ein(spec, x_BTI, weight).astype(x_BTI.dtype), KEPT)
