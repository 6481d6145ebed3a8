"""Cross-entropy of the next token, or what the section `loss` makes of it: the weighted sum over trained tokens.

Hidden rows that are trained are gathered, and go through the head chunk by chunk. The gradient is formed beside each
chunk's logits, so these are made once, and the loop runs only over chunks that hold something.
"""

# B packs side by side, or parts of them, T tokens, N trained positions, padded to T, R of one chunk, D width,
# V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from training_hub.backends.jax_engine.batches import CHUNK, Arrays
from training_hub.backends.jax_engine.forward import Forward, Params
from training_hub.backends.jax_engine.products import ein
from training_hub.recipe.loss import Loss

jax.tree_util.register_dataclass(
    Arrays, ["ids", "positions", "segments", "rows", "targets", "weights", "chunks", "noise"], []
)


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a token t with logits z, where p = softmax(z) and Z = log(sum of e^z):

        share * ((1 - smoothing) * -log p(t) + smoothing * mean over v of -log p(v)) + z * Z^2

    share is 1, or with `dft` p(t) itself without a gradient (dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629).
    """

    smoothing: float = 0.0
    z: float = 0.0
    dft: bool = False

    @staticmethod
    def of(settings: Loss) -> TokenLoss:
        return TokenLoss(settings.label_smoothing, settings.z_loss, settings.dft)

    def losses(self, logits: Array, targets: Array) -> Array:
        """The losses of logits [..., V]."""
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        surprise = normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        share = lax.stop_gradient(jnp.exp(-surprise)) if self.dft else 1.0
        if self.smoothing:
            surprise = (1 - self.smoothing) * surprise + self.smoothing * (normaliser - logits.mean(axis=-1))
        found = share * surprise
        return found + self.z * normaliser**2 if self.z else found


PLAIN = TokenLoss()


def term(
    forward: Forward, loss: TokenLoss, params: Params, batch: Arrays, trains_head: bool = True
) -> tuple[Array, Array]:
    """The weighted sum of the batch's losses, a float32 scalar not yet divided by anything, and its summands [B, N].

    trains_head: whether the head's gradient is wanted; where it is not, it is taken for 0.
    """
    hidden_BTD = forward.hidden(params, batch.ids, batch.positions, batch.segments, batch.noise)
    rows_BND = _at_rows(hidden_BTD, batch)
    return _head(loss, trains_head, rows_BND, params[forward.head], batch.targets, batch.weights, batch.chunks)


def term_of_whole(forward: Forward, loss: TokenLoss, params: Params, batch: Arrays) -> Array:
    """The same sum from the logits of every position: what `term` is compared with."""
    logits_BTV = forward.logits(params, batch.ids, batch.positions, batch.segments)
    return jnp.sum(loss.losses(_at_rows(logits_BTV, batch), batch.targets) * batch.weights)


def _at_rows(array_BTX: Array, batch: Arrays) -> Array:
    """[B, N, X]: what stands at the trained positions of each part of a pack."""
    of_parts = array_BTX.reshape(*batch.rows.shape, array_BTX.shape[-1])
    return jnp.take_along_axis(of_parts, batch.rows[:, :, None], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head(
    loss: TokenLoss,
    trains_head: bool,
    rows_BND: Array,
    head_VD: Array,
    targets: Array,
    weights: Array,
    chunks: Array,
) -> tuple[Array, Array]:
    cast_VD = head_VD.astype(rows_BND.dtype)

    def step(number: Array, losses_BN: Array) -> Array:
        part = _part(number)
        logits = ein("brd,vd->brv", part(rows_BND), cast_VD)
        return _put(losses_BN, loss.losses(logits, part(targets)) * part(weights), number)

    losses_BN = lax.fori_loop(0, chunks, step, jnp.zeros_like(weights))
    return losses_BN.sum(), losses_BN


def _head_forward(
    loss: TokenLoss,
    trains_head: bool,
    rows_BND: Array,
    head_VD: Array,
    targets: Array,
    weights: Array,
    chunks: Array,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    cast_VD = head_VD.astype(rows_BND.dtype)

    def step(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        losses_BN, to_rows, to_head = so_far
        part = _part(number)
        hidden = part(rows_BND)

        def weighted(logits: Array) -> tuple[Array, Array]:
            losses = loss.losses(logits, part(targets)) * part(weights)
            return losses.sum(), losses

        (_, losses), slope = jax.value_and_grad(weighted, has_aux=True)(ein("brd,vd->brv", hidden, cast_VD))
        slope = slope.astype(hidden.dtype)
        to_rows = _put(to_rows, ein("brv,vd->brd", slope, cast_VD).astype(to_rows.dtype), number)
        to_head = to_head + ein("brv,brd->vd", slope, hidden) if trains_head else to_head
        return _put(losses_BN, losses, number), to_rows, to_head

    start = (jnp.zeros_like(weights), jnp.zeros_like(rows_BND), jnp.zeros(head_VD.shape, jnp.float32))
    losses_BN, to_rows, to_head = lax.fori_loop(0, chunks, step, start)
    return (losses_BN.sum(), losses_BN), (to_rows, to_head.astype(head_VD.dtype))


def _head_backward(
    loss: TokenLoss, trains_head: bool, kept: tuple[Array, Array], gradients: tuple[Array, Array]
) -> tuple[Array, Array, None, None, None]:
    # The summands are told, not trained: only the sum has a gradient.
    to_rows, to_head = kept
    factor = gradients[0]
    return (to_rows * factor).astype(to_rows.dtype), to_head * factor, None, None, None


_head.defvjp(_head_forward, _head_backward)


def _part(number: Array) -> Callable[[Array], Array]:
    """What takes chunk `number` out of an array [B, N, ...]."""
    return lambda array: lax.dynamic_slice_in_dim(array, number * CHUNK, CHUNK, axis=1)


def _put(array: Array, part: Array, number: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(array, part, number * CHUNK, axis=1)
