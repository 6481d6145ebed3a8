"""The optimizer step: gradients summed in float32, divided and clipped once, applied to float32 masters.

The update rules are optax's, put together so that each is torch's own; a test compares them. What they keep is named
in checkpoints as torch names it, so that either engine reads what the other wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from training_hub.recipe.sections import Optimizer as Settings

Tree = dict[str, Array]

CLIP_EPS = 1e-6
"""Added to the norm that gradients are scaled down by, as torch's clip_grad_norm_ does."""

RMSPROP_DECAY = 0.99
"""torch.optim.RMSprop: alpha."""

STEP = "step"
"""What torch calls the number of steps that a weight has made."""

Transformation: TypeAlias = optax.GradientTransformation


@dataclass(frozen=True)
class Rule:
    """An update rule. parts: optax's transformations in order, given the one that decays weights. names: what optax
    calls the numbers it keeps of each weight, to torch's names for the same. counts: torch also keeps a step count."""

    parts: Callable[[Settings, Transformation], list[Transformation]]
    names: Mapping[str, str]
    counts: bool = True


def _adam(settings: Settings) -> Transformation:
    return optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)


def _momentum(settings: Settings) -> list[Transformation]:
    return [optax.trace(settings.momentum)] if settings.momentum else []


RULES: Mapping[str, Rule] = {
    "AdamW": Rule(lambda s, decay: [_adam(s), decay], {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    "Adam": Rule(lambda s, decay: [decay, _adam(s)], {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    "SGD": Rule(lambda s, decay: [decay, *_momentum(s)], {"trace": "momentum_buffer"}, counts=False),
    "RMSprop": Rule(
        lambda s, decay: [decay, optax.scale_by_rms(RMSPROP_DECAY, s.eps, eps_in_sqrt=False), *_momentum(s)],
        {"nu": "square_avg", "trace": "momentum_buffer"},
    ),
    "Lion": Rule(lambda s, decay: [optax.scale_by_lion(s.beta1, s.beta2), decay], {"mu": "exp_avg"}, counts=False),
}
"""Where weight decay stands: beside the gradient (Adam, SGD, RMSprop), or beside the step (AdamW, Lion)."""


class Around(Protocol):
    """What an adaptation does around the update rule; frozen: the weights that stay."""

    def before(self, weights: Tree, gradients: Tree, frozen: Tree, rate: Array) -> tuple[Tree, Tree]: ...

    def after(self, weights: Tree, frozen: Tree) -> Tree: ...


class Updater:
    """The update rule of a recipe, as compiled functions of weights, state and gradients.

    undecayed: names of weights that do not decay, whatever their shape. pin: puts what belongs to a weight, within a
    program, where the weight lies. around: what an adaptation does to weights and gradients around the rule.
    """

    def __init__(
        self,
        settings: Settings,
        max_norm: float,
        undecayed: frozenset[str] = frozenset(),
        pin: Callable[[str, Array], Array] = lambda name, value: value,
        around: Around | None = None,
    ):
        self._pin, self._around = pin, around
        self._kind = RULES[settings.name]
        self._rule = optax.chain(*self._kind.parts(settings, _decay(settings, undecayed)))
        self._limit = max_norm if max_norm > 0 else float("inf")
        self.begin: Callable[[Tree], Any] = jax.jit(lambda weights: self._pinned(self._rule.init(weights)))
        self.norm: Callable[[Tree, float], Array] = jax.jit(_norm)
        self.step: Callable[..., tuple[Tree, Any]] = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(
        self, weights: Tree, state: Any, gradients: Tree, frozen: Tree, norm: Array, weight: Array, rate: Array
    ) -> Any:
        """Weights and state after a step.

        gradients: sums over the tokens of the step, whose trained weight is `weight`; norm: that of their mean.
        """
        factor = jnp.minimum(1.0, self._limit / (norm + CLIP_EPS)) / weight
        scaled = {name: gradient * factor for name, gradient in gradients.items()}
        if self._around is not None:
            weights, scaled = self._around.before(weights, scaled, frozen, rate)
        updates, state = self._rule.update(scaled, state, weights)
        moved = {name: value - rate * updates[name] for name, value in weights.items()}
        if self._around is not None:
            moved = self._around.after(moved, frozen)
        return {name: self._pin(name, value) for name, value in moved.items()}, self._pinned(state)

    def _pinned(self, state: Any) -> Any:
        def pinned(path: Any, value: Array) -> Array:
            weight, _ = _place(path)
            return value if weight is None else self._pin(weight, value)

        return jax.tree_util.tree_map_with_path(pinned, state)

    def named(self, state: Any, steps: int) -> dict[str, np.ndarray]:
        """What the optimizer keeps, by `weight name/state name`. steps: those made, where it does not count them."""
        found: dict[str, np.ndarray] = {}
        for path, value in jax.tree_util.tree_leaves_with_path(state):
            weight, kind = _place(path)
            if weight is None:
                steps = int(value)
            else:
                found[f"{weight}/{self._kind.names[kind]}"] = np.asarray(value)
        counted = sorted({name.rpartition("/")[0] for name in found}) if self._kind.counts else []
        return {**found, **{f"{weight}/{STEP}": np.asarray(steps, np.float32) for weight in counted}}

    def like(self, state: Any, tensors: Mapping[str, np.ndarray]) -> Any:
        """A state of the same form with the contents that `named` gave."""
        steps = next((int(value) for name, value in tensors.items() if name.endswith(f"/{STEP}")), 0)

        def taken(path: Any, value: Array) -> Array:
            weight, kind = _place(path)
            if weight is None:
                return jnp.asarray(steps, value.dtype)
            held = np.asarray(tensors[f"{weight}/{self._kind.names[kind]}"])
            return jax.device_put(held.astype(value.dtype), value.sharding)

        return jax.tree_util.tree_map_with_path(taken, state)


def _decay(settings: Settings, undecayed: frozenset[str]) -> Transformation:
    def mask(weights: Tree) -> dict[str, bool]:
        return {name: weight.ndim >= 2 and name not in undecayed for name, weight in weights.items()}

    return optax.add_decayed_weights(settings.weight_decay, mask=mask)


def _norm(gradients: Tree, weight: Array) -> Array:
    """The norm of the mean gradient over all weights."""
    squares = [jnp.sum(jnp.square(gradient / weight)) for gradient in gradients.values()]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _place(path: Any) -> tuple[str | None, str]:
    """Of a number that optax keeps: the weight that it belongs to, None for a count, and what it is."""
    kinds = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    weights = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    return (weights[0] if weights else None), kinds[-1]
