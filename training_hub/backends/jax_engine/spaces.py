"""The algebra of OSFT in JAX: dense weights from what trains, and what stays out of the protected space."""

# N rows, M <= N columns, k protected, r = M - k low directions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from training_hub.backends.jax_engine.osft import LEFT, PROTECTED, RIGHT, S0, U0, V0, VALUES

Tree = dict[str, Array]


def merged(params: Mapping[str, Array]) -> Tree:
    """Weights by their own names: each decomposed one, as it stands now, in the place of what it began as."""
    found = {name: value for name, value in params.items() if "/" not in name and "@" not in name}
    for name in params:
        if name.endswith(LEFT):
            key = name.removesuffix(LEFT)
            moved = _moved(params, key)
            is_wide = found[key].shape[0] < found[key].shape[1]
            found[key] = jnp.asarray(found[key]) + (moved.T if is_wide else moved)
    return found


def _moved(params: Mapping[str, Array], key: str) -> Array:
    """[N, M]: U diag(S) V - U0 diag(S0) V0 = (A diag(S) + U0 diag(s)) V + U0 diag(S0) B, as precise as it is small."""
    left, values, right = params[f"{key}{LEFT}"], params[f"{key}{VALUES}"], params[f"{key}{RIGHT}"]
    u0, s0, v0 = params[f"{key}{U0}"], params[f"{key}{S0}"], params[f"{key}{V0}"]
    return _product(left * (s0 + values) + u0 * values, v0 + right) + _product(u0 * s0, right)


@dataclass(frozen=True)
class Projection:
    """What is done around the optimizer's step to A, s and B of these matrices.

    decay: of U, S and V; is_decoupled: the decay shrinks weights by rate x decay, else it is added to the gradient.
    """

    keys: tuple[str, ...]
    decay: float
    is_decoupled: bool

    def before(self, weights: Tree, gradients: Tree, frozen: Tree, rate: Array) -> tuple[Tree, Tree]:
        """Weights and gradients as the optimizer is to see them: projected, and decayed."""
        gradients = self.after(gradients, frozen)
        for key in self.keys if self.decay else ():
            for name, start in ((LEFT, U0), (VALUES, S0), (RIGHT, V0)):
                total = weights[f"{key}{name}"] + frozen[f"{key}{start}"]
                changed = weights if self.is_decoupled else gradients
                factor = -rate * self.decay if self.is_decoupled else self.decay
                changed = {**changed, f"{key}{name}": changed[f"{key}{name}"] + factor * total}
                weights, gradients = (changed, gradients) if self.is_decoupled else (weights, changed)
        return weights, gradients

    def after(self, weights: Tree, frozen: Tree) -> Tree:
        """The same without what points into the protected space: (I - U_h U_h^T) A and B V0^T V0."""
        found = dict(weights)
        for key in self.keys:
            left, right, v0 = weights[f"{key}{LEFT}"], weights[f"{key}{RIGHT}"], frozen[f"{key}{V0}"]
            # Of a square matrix U0 spans the complement of what is protected; else the protected columns are known.
            basis = frozen.get(f"{key}{PROTECTED}", frozen[f"{key}{U0}"])
            inside = _product(basis, _product(basis.T, left))
            found[f"{key}{LEFT}"] = left - inside if f"{key}{PROTECTED}" in frozen else inside
            found[f"{key}{RIGHT}"] = _product(_product(right, v0.T), v0)
        return found


def _product(one: Array, other: Array) -> Array:
    return jnp.matmul(one, other, precision=lax.Precision.HIGHEST)
