"""The update rules: optax's transformations put together so that each is torch's own, and ours where optax differs.

Each is about one weight, which is a tree of a single array, so that a weight may begin later than others.
"""

# G, X gradient of one weight and what becomes of it

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jax import Array

from training_hub.recipe.sections import Optimizer as Settings

Transformation: TypeAlias = optax.GradientTransformation

RMSPROP_DECAY = 0.99
"""torch.optim.RMSprop: alpha."""

MOMENTUM_DECAY = 4e-3
"""torch.optim.NAdam: momentum_decay."""

MUON_MOMENTUM, MUON_STEPS, MUON_EPS, MUON_FACTORS = 0.95, 5, 1e-7, (3.4445, -4.7750, 2.0315)
"""torch.optim.Muon: steps of the Newton-Schulz iteration and the factors of its polynomial."""

ADAFACTOR_DECAY, ADAFACTOR_LEAST = -0.8, 1e-3
"""torch.optim.Adafactor: beta2_decay, and the least size of a weight that steps are in proportion to."""


@dataclass(frozen=True)
class Rule:
    """An update rule. parts: transformations in order, given the one that decays weights. names: what these call the
    numbers they keep of a weight, to torch's names for the same. counts: torch also keeps how many steps it made."""

    parts: Callable[[Settings, Transformation], list[Transformation]]
    names: Mapping[str, str]
    counts: bool = True


class _Adaptive(NamedTuple):
    """What NAdam and RAdam keep; product: of NAdam's momenta so far."""

    count: Array
    mu: Array
    nu: Array
    product: Array | None = None


def _adam(settings: Settings) -> Transformation:
    return optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)


def _momentum(settings: Settings) -> list[Transformation]:
    return [optax.trace(settings.momentum)] if settings.momentum else []


def _nadam(settings: Settings) -> Transformation:
    """Adam with Nesterov's momentum, which grows over the run: Dozat 2016, as torch has it."""
    beta1, beta2, eps = settings.beta1, settings.beta2, settings.eps

    def momentum(step: Array) -> Array:
        return beta1 * (1 - 0.5 * 0.96 ** (step * MOMENTUM_DECAY))

    def update(gradient: Array, state: _Adaptive, weight: Any = None) -> tuple[Array, _Adaptive]:
        kept = _moments(gradient, state, beta1, beta2)
        step = kept.count.astype(jnp.float32)
        now, then = momentum(step), momentum(step + 1)
        product = state.product * now
        ahead = (1 - now) * gradient / (1 - product) + then * kept.mu / (1 - product * then)
        return ahead / (jnp.sqrt(kept.nu / _missing(beta2, step)) + eps), kept._replace(product=product)

    return Transformation(lambda weight: _nothing(weight)._replace(product=jnp.ones(())), update)


def _radam(settings: Settings) -> Transformation:
    """Adam that divides only once the variance of its divisor is known: Liu et al. 2019, arXiv:1908.03265."""
    beta1, beta2, eps = settings.beta1, settings.beta2, settings.eps
    most = 2 / (1 - beta2) - 1

    def update(gradient: Array, state: _Adaptive, weight: Any = None) -> tuple[Array, _Adaptive]:
        kept = _moments(gradient, state, beta1, beta2)
        step = kept.count.astype(jnp.float32)
        missing = _missing(beta2, step)
        length = most - 2 * step * beta2**step / missing
        share = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        divisor = (jnp.sqrt(kept.nu) + eps) / jnp.sqrt(jnp.maximum(share, 0) * missing)
        mean = kept.mu / _missing(beta1, step)
        return jnp.where(length > 5, mean / divisor, mean), kept

    return Transformation(_nothing, update)


def _nothing(weight: Array) -> _Adaptive:
    return _Adaptive(jnp.zeros((), jnp.int32), jnp.zeros_like(weight), jnp.zeros_like(weight))


def _moments(gradient: Array, state: _Adaptive, beta1: float, beta2: float) -> _Adaptive:
    mu = state.mu + (1 - beta1) * (gradient - state.mu)
    return state._replace(count=state.count + 1, mu=mu, nu=beta2 * state.nu + (1 - beta2) * gradient * gradient)


def _missing(beta: float, step: Array) -> Array:
    """1 - beta^step, to all digits where beta is nearly 1."""
    return -jnp.expm1(step * math.log(beta)) if beta else jnp.ones(())


class _Sum(NamedTuple):
    sum: Array


def _adagrad(settings: Settings) -> Transformation:
    def update(gradient: Array, state: _Sum, weight: Any = None) -> tuple[Array, _Sum]:
        total = state.sum + gradient * gradient
        return gradient / (jnp.sqrt(total) + settings.eps), _Sum(total)

    return Transformation(lambda weight: _Sum(jnp.zeros_like(weight)), update)


class _Factored(NamedTuple):
    """What Adafactor keeps: means over rows and columns of a matrix, or the squares of a vector."""

    count: Array
    row: Array | None
    column: Array | None
    variance: Array | None


def _adafactor(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """Steps in proportion to the weight, divided by factored squares: Shazeer and Stern 2018, arXiv:1804.04235."""

    def init(weight: Array) -> _Factored:
        zero, count = jnp.zeros_like(weight), jnp.zeros((), jnp.int32)
        if weight.ndim < 2:
            return _Factored(count, None, None, zero)
        return _Factored(count, zero[..., :1], zero[..., :1, :], None)

    def update(gradient: Array, state: _Factored, weight: Any = None, *, rate: Array, **_: Any) -> Any:
        count = state.count + 1
        step, least = count.astype(jnp.float32), jnp.finfo(jnp.float32).eps
        squares, share = gradient * gradient, step**ADAFACTOR_DECAY
        if state.row is None or state.column is None:
            assert state.variance is not None
            found = state.variance + share * (squares - state.variance)
            state = state._replace(count=count, variance=found)
        else:
            row = state.row + share * (squares.mean(axis=-1, keepdims=True) - state.row)
            column = state.column + share * (squares.mean(axis=-2, keepdims=True) - state.column)
            found = row * column / jnp.maximum(row.mean(axis=-2, keepdims=True), least)
            state = state._replace(count=count, row=row, column=column)
        scaled = gradient / jnp.sqrt(jnp.maximum(found, least * least))
        size = jnp.maximum(ADAFACTOR_LEAST, _root_mean_square(weight)) / jnp.maximum(1.0, _root_mean_square(scaled))
        # torch takes the smaller of the rate and 1 / sqrt(step); what is given back is multiplied by the rate.
        return scaled * size * jnp.minimum(1.0, 1 / (rate * jnp.sqrt(step))), state

    return optax.GradientTransformationExtraArgs(init, update)


def _root_mean_square(numbers: Array) -> Array:
    return jnp.sqrt(jnp.mean(numbers * numbers))


class _Buffer(NamedTuple):
    buffer: Array


def _muon(settings: Settings) -> Transformation:
    """Momentum made orthogonal, of the size of AdamW's steps: Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982."""
    momentum = MUON_MOMENTUM if settings.momentum is None else settings.momentum

    def update(gradient: Array, state: _Buffer, weight: Any = None) -> tuple[Array, _Buffer]:
        buffer = state.buffer + (1 - momentum) * (gradient - state.buffer)
        ahead = gradient + momentum * (buffer - gradient) if momentum > 0 else buffer
        return 0.2 * math.sqrt(max(gradient.shape)) * _orthogonal(ahead), _Buffer(buffer)

    return Transformation(lambda weight: _Buffer(jnp.zeros_like(weight)), update)


def _orthogonal(G: Array) -> Array:
    """The matrix of the singular directions of G, nearly, by a polynomial iteration in bfloat16 as torch makes it."""
    a, b, c = MUON_FACTORS
    is_tall = G.shape[0] > G.shape[1]
    X = (G.T if is_tall else G).astype(jnp.bfloat16)
    norm = jnp.sqrt(jnp.sum(jnp.square(X.astype(jnp.float32)))).astype(jnp.bfloat16)
    X = X / jnp.maximum(norm, jnp.bfloat16(MUON_EPS))
    for _ in range(MUON_STEPS):
        squares = _exact(X, X.T).astype(jnp.bfloat16)
        mixed = (b * squares.astype(jnp.float32) + c * _exact(squares, squares)).astype(jnp.bfloat16)
        X = (a * X.astype(jnp.float32) + _exact(mixed, X)).astype(jnp.bfloat16)
    return (X.T if is_tall else X).astype(G.dtype)


def _exact(one: Array, other: Array) -> Array:
    return jnp.matmul(one, other, preferred_element_type=jnp.float32)


MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}

RULES: Mapping[str, Rule] = {
    "AdamW": Rule(lambda s, decay: [_adam(s), decay], MOMENTS),
    "Adam": Rule(lambda s, decay: [decay, _adam(s)], MOMENTS),
    "NAdam": Rule(lambda s, decay: [decay, _nadam(s)], {**MOMENTS, "product": "mu_product"}),
    "RAdam": Rule(lambda s, decay: [decay, _radam(s)], MOMENTS),
    "SGD": Rule(lambda s, decay: [decay, *_momentum(s)], {"trace": "momentum_buffer"}, counts=False),
    "Adagrad": Rule(lambda s, decay: [decay, _adagrad(s)], {"sum": "sum"}),
    "RMSprop": Rule(
        lambda s, decay: [decay, optax.scale_by_rms(RMSPROP_DECAY, s.eps, eps_in_sqrt=False), *_momentum(s)],
        {"nu": "square_avg", "trace": "momentum_buffer"},
    ),
    "Adafactor": Rule(
        lambda s, decay: [_adafactor(s), decay], {"row": "row_var", "column": "col_var", "variance": "variance"}
    ),
    "Lion": Rule(lambda s, decay: [optax.scale_by_lion(s.beta1, s.beta2), decay], {"mu": "exp_avg"}, counts=False),
    "Muon": Rule(lambda s, decay: [_muon(s), decay], {"buffer": "momentum_buffer"}, counts=False),
}
"""Where weight decay stands: beside the gradient (Adam, NAdam, RAdam, SGD, Adagrad, RMSprop), or beside the step."""

BESIDE = {"Muon": "AdamW"}
"""What moves the weights that are no matrices inside the model's blocks, where the optimizer is about these alone."""


def rule_of(settings: Settings, is_matrix: bool) -> Rule:
    """The rule of a weight, which is a matrix inside the blocks or is not."""
    return RULES[settings.name if is_matrix else BESIDE.get(settings.name, settings.name)]
