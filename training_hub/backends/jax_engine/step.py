"""What is compiled: the gradient of one batch of packs, added to those before it; the loss alone; the logits.

Each is one program for each size of pack. The sums of a step stay on the device until its end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from training_hub.backends.jax_engine.batches import Arrays
from training_hub.backends.jax_engine.forward import Forward, Params
from training_hub.backends.jax_engine.mesh import Mesh
from training_hub.backends.jax_engine.objective import PLAIN, TokenLoss, term, term_of_whole

Tree = dict[str, Array]
Merge = Callable[[dict[str, Array]], Params]


class Steps:
    """The compiled functions of one model.

    loss: what is minimised; evaluation is plain cross-entropy. merge: the model's weights, from what trains and stays.
    """

    def __init__(self, forward: Forward, loss: TokenLoss, mesh: Mesh, merge: Merge = dict):
        self.forward, self.merge = forward, merge
        self.nothing: Callable[[Tree], Tree] = jax.jit(partial(_zeros, mesh))
        """(trained) -> sums of gradients before the first batch of a step, in float32."""
        self.add: Callable[..., tuple[Tree, Array, Array]] = jax.jit(
            partial(_add, forward, loss, mesh, merge), donate_argnums=(2,)
        )
        """(trained, frozen, sums of gradients so far, batch) -> (sums, total, losses [B, N])."""
        self.total: Callable[..., tuple[Array, Array]] = jax.jit(partial(_total, forward, PLAIN, merge))
        """(trained, frozen, batch) -> weighted sum of plain cross-entropy, and its summands [B, N]."""
        self.objective: Callable[..., tuple[Array, Array]] = jax.jit(partial(_total, forward, loss, merge))
        """The same of what is minimised."""
        self.whole: Callable[..., tuple[Tree, Array]] = jax.jit(
            partial(_whole, forward, loss, mesh, merge), donate_argnums=(2,)
        )
        """As `add`, from the logits of every position."""
        self.logits: Callable[..., Array] = jax.jit(partial(_logits, forward, merge))
        """(trained, frozen, ids, positions, segments) -> logits [B, T, V]."""


def _zeros(mesh: Mesh, weights: Tree) -> Tree:
    return mesh.pinned({name: jnp.zeros_like(weight, dtype=jnp.float32) for name, weight in weights.items()})


def _add(
    forward: Forward, loss: TokenLoss, mesh: Mesh, merge: Merge, trained: Tree, frozen: Tree, sums: Tree, batch: Arrays
) -> tuple[Tree, Array, Array]:
    def measured(weights: Tree) -> tuple[Array, Array]:
        return term(forward, loss, merge({**frozen, **weights}), batch, forward.head in weights)

    (total, losses), gradients = jax.value_and_grad(measured, has_aux=True)(trained)
    return mesh.pinned({name: sums[name] + gradients[name] for name in sums}), total, losses


def _total(
    forward: Forward, loss: TokenLoss, merge: Merge, trained: Tree, frozen: Tree, batch: Arrays
) -> tuple[Array, Array]:
    return term(forward, loss, merge({**frozen, **trained}), batch)


def _whole(
    forward: Forward, loss: TokenLoss, mesh: Mesh, merge: Merge, trained: Tree, frozen: Tree, sums: Tree, batch: Arrays
) -> tuple[Tree, Array]:
    def measured(weights: Tree) -> Array:
        return term_of_whole(forward, loss, merge({**frozen, **weights}), batch)

    total, gradients = jax.value_and_grad(measured)(trained)
    return mesh.pinned({name: sums[name] + gradients[name] for name in sums}), total


def _logits(
    forward: Forward, merge: Merge, trained: Tree, frozen: Tree, ids: Array, positions: Array, segments: Array
) -> Array:
    return forward.logits(merge({**frozen, **trained}), ids, positions, segments)
