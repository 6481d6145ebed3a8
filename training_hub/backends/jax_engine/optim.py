"""The optimizer step: gradients summed in float32, divided and clipped once, applied to float32 masters.

Each weight is moved by itself, so that one may begin later than others. What is kept is named in checkpoints as torch
names it, so that either engine reads what the other wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from training_hub.backends.jax_engine.processes import placed, whole
from training_hub.backends.jax_engine.rules import Rule, rule_of
from training_hub.recipe.sections import Optimizer as Settings

Tree = dict[str, Array]

State = dict[str, tuple[Array, Any]]
"""By name of the weight: how many steps it has made, and what its rule keeps."""

CLIP_EPS = 1e-6
"""Added to the norm that gradients are scaled down by, as torch's clip_grad_norm_ does."""

STEP = "step"
"""What torch calls the number of steps that a weight has made."""


class Around(Protocol):
    """What an adaptation does around the update rule; frozen: the weights that stay."""

    def before(self, weights: Tree, gradients: Tree, frozen: Tree, rate: Array) -> tuple[Tree, Tree]: ...

    def after(self, weights: Tree, frozen: Tree) -> Tree: ...


class Updater:
    """The update rule of a recipe, as compiled functions of weights, state and gradients.

    undecayed: names of weights that do not decay, whatever their shape. pin: puts what belongs to a weight, within a
    program, where the weight lies. around: what an adaptation does to weights and gradients around the rule. tables:
    names of embeddings and the head, which some optimizers do not move as matrices.
    """

    def __init__(
        self,
        settings: Settings,
        max_norm: float,
        undecayed: frozenset[str] = frozenset(),
        pin: Callable[[str, Array], Array] = lambda name, value: value,
        around: Around | None = None,
        tables: frozenset[str] = frozenset(),
    ):
        self._settings, self._pin, self._around = settings, pin, around
        self._undecayed, self.tables = undecayed, tables
        self._limit = max_norm if max_norm > 0 else float("inf")
        self._made = cache(self._make)
        self.begin: Callable[[Tree], State] = jax.jit(self._begin)
        self.norm: Callable[[Tree, float], Array] = jax.jit(_norm)
        self.step: Callable[..., tuple[Tree, State]] = jax.jit(self._step, donate_argnums=(0, 1))

    def _begin(self, weights: Tree) -> State:
        zero = jnp.zeros((), jnp.int32)
        made = {name: (zero, self._of(name, weight)[1].init(weight)) for name, weight in weights.items()}
        return self._pinned(made, weights)

    def _step(
        self, weights: Tree, state: State, gradients: Tree, frozen: Tree, norm: Array, weight: Array, rate: Array
    ) -> tuple[Tree, State]:
        """Weights and state after a step.

        gradients: sums over the tokens of the step, whose trained weight is `weight`; norm: that of their mean.
        """
        factor = jnp.minimum(1.0, self._limit / (norm + CLIP_EPS)) / weight
        scaled = {name: gradient * factor for name, gradient in gradients.items()}
        if self._around is not None:
            weights, scaled = self._around.before(weights, scaled, frozen, rate)
        moved, kept = {}, {}
        for name, value in weights.items():
            (count, before), (_, rule) = state[name], self._of(name, value)
            update, after = rule.update(scaled[name], before, value, rate=rate)
            moved[name], kept[name] = value - rate * update, (count + 1, after)
        if self._around is not None:
            moved = self._around.after(moved, frozen)
        return {name: self._pin(name, value) for name, value in moved.items()}, self._pinned(kept, moved)

    def _of(self, name: str, weight: Array) -> tuple[Rule, optax.GradientTransformationExtraArgs]:
        """The rule of a weight, and what carries it out."""
        is_matrix = weight.ndim == 2 and name not in self.tables
        return self._made(is_matrix, weight.ndim >= 2 and name not in self._undecayed)

    def _make(self, is_matrix: bool, decays: bool) -> tuple[Rule, optax.GradientTransformationExtraArgs]:
        rule, decay = rule_of(self._settings, is_matrix), self._settings.weight_decay
        fading = optax.add_decayed_weights(decay) if decays and decay else optax.identity()
        return rule, optax.with_extra_args_support(optax.chain(*rule.parts(self._settings, fading)))

    def _pinned(self, state: State, weights: Tree) -> State:
        def pinned(path: Any, value: Array) -> Array:
            name, _ = _place(path)
            return self._pin(name, value) if value.shape == weights[name].shape else value

        found: State = jax.tree_util.tree_map_with_path(pinned, state)
        return found

    def named(self, state: State, weights: Tree, fetch: Callable[[Array], np.ndarray] = whole) -> dict[str, np.ndarray]:
        """What the optimizer keeps of these weights, by `weight name/state name`."""
        found: dict[str, np.ndarray] = {}
        for path, value in jax.tree_util.tree_leaves_with_path(state):
            name, kind = _place(path)
            rule, _ = self._of(name, weights[name])
            if kind in rule.names:
                found[f"{name}/{rule.names[kind]}"] = fetch(value)
            elif kind == STEP and rule.counts:
                found[f"{name}/{STEP}"] = np.asarray(fetch(value), np.float32)
        return found

    def like(self, state: State, weights: Tree, tensors: Mapping[str, np.ndarray]) -> State:
        """A state of the same form with the contents that `named` gave; a weight that is not among them has made no
        step."""
        known = {name.rpartition("/")[0] for name in tensors}

        def taken(path: Any, value: Array) -> Array:
            name, kind = _place(path)
            if name not in known:
                return value
            rule, _ = self._of(name, weights[name])
            if kind not in rule.names:
                return placed(np.asarray(tensors.get(f"{name}/{STEP}", 0), value.dtype), value.sharding)
            held = np.asarray(tensors[f"{name}/{rule.names[kind]}"])
            return placed(held.astype(value.dtype), value.sharding)

        found: State = jax.tree_util.tree_map_with_path(taken, state)
        return found


def _norm(gradients: Tree, weight: Array) -> Array:
    """The norm of the mean gradient over all weights."""
    squares = [jnp.sum(jnp.square(gradient / weight)) for gradient in gradients.values()]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _place(path: Any) -> tuple[str, str]:
    """Of a number that is kept: the weight that it belongs to, and what it is; optax has counts of its own."""
    kinds = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return str(path[0].key), kinds[-1] if kinds else STEP
