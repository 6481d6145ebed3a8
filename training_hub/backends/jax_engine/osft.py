"""OSFT as an adaptation of the jax engine: large singular directions of each matrix are protected, small ones train.

W = W0 + U diag(S) V - U0 diag(S0) V0, where U0, S0, V0 are the small part of W0. What is trained is A = U - U0,
s = S - S0 and B = V - V0, whose gradients JAX finds; these, and what the optimizer makes of them, are projected out of
the protected space. Source: Nayak et al. 2025, arXiv:2504.07097; the torch engine does the same on dense gradients.
"""

# N rows, M <= N columns of a matrix with its longer side first, k protected, r = M - k low directions

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from training_hub.backends.jax_engine.full import Full, Staying, Weights
from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import leaves
from training_hub.backends.jax_engine.weights import size_of
from training_hub.backends.shared.freezing import Turns
from training_hub.backends.shared.sameness import Shapes
from training_hub.recipe import Recipe
from training_hub.types import Console

LEFT, VALUES, RIGHT = "/left", "/values", "/right"
"""What stands behind the name of a matrix: A, s and B, which train."""

U0, S0, V0, PROTECTED = "@left", "@values", "@right", "@protected"
"""The small part as it came, and of a matrix that is not square the protected columns of its long side."""

DECOUPLED = ("AdamW", "Lion")
"""Optimizers that decay weights themselves, apart from gradients."""

TORCH = "or write backend: torch, which does it."


def problems(recipe: Recipe) -> Iterator[str]:
    """What this engine's OSFT cannot do of what the recipe asks, each with its remedy; no weight is read."""
    asked = recipe.osft
    refused = {
        "energy": (asked.energy is not None, "ranks come from unfreeze_rank_ratio here; give that"),
        "importance": (asked.importance, "all blocks are protected alike here; write false"),
        "targets": (asked.targets is not None, "every linear layer of the blocks is protected here; leave it out"),
        "form": (asked.form != "factors", "write factors"),
        "split_fused": (asked.split_fused, "a fused weight is cut as a whole here; write false"),
        "gradients": (asked.gradients != "step", "write step"),
        "carry": (asked.carry, "nothing is carried from task to task here; write false"),
    }
    for name, (is_refused, reason) in refused.items():
        if is_refused:
            yield f"osft.{name}: found {getattr(asked, name)}; backend jax: {reason}, {TORCH}"
    if asked.unfreeze_rank_ratio is None and asked.energy is None:
        yield "osft.unfreeze_rank_ratio: backend jax needs it: the share of directions that may move, such as 0.3."


class Spaces:
    """The adaptation that keeps every update of a matrix out of its protected directions."""

    scale = 1.0
    dropout = 0.0
    file: str | None = None
    own_format: str | None = None
    turns = Turns()

    def __init__(self, recipe: Recipe, shape: Shape, source: Path, console: Console):
        self._settings, self._optimizer, self._console = recipe.osft, recipe.optimizer, console
        self._full = Full(shape, source)
        ratio = recipe.osft.unfreeze_rank_ratio or 0.0
        sizes = {key: size_of(leaf, key, shape) for key, leaf in leaves(shape) if leaf.is_linear}
        self._linear = frozenset(sizes)
        self._stays = frozenset(sizes) if ratio == 0 else frozenset()
        kept = {key: rank_kept(min(size), ratio) for key, size in sizes.items() if ratio > 0}
        # A matrix without a direction to protect trains in full.
        self._kept = {key: rank for key, rank in kept.items() if rank > 0}
        self._sizes = {key: sizes[key] for key in self._kept}
        self.undecayed = frozenset(name for key in self._kept for name in _names(key))

    def shapes(self) -> Shapes:
        found = {name: size for name, size in self._full.shapes().items() if self._is_other(name)}
        for key, (rows, columns) in self._sizes.items():
            low = min(rows, columns) - self._kept[key]
            parts = ((max(rows, columns), low), (low,), (low, min(rows, columns)))
            found |= dict(zip(_names(key), parts, strict=True))
        return found

    def _is_other(self, name: str) -> bool:
        """Whether a weight trains in full."""
        if name in self._linear:
            return name not in self._kept and name not in self._stays
        return self._settings.others == "train"

    def staying(self, formats: Mapping[str, str]) -> Staying:
        """The weights as they came, and of each that is decomposed its small part."""
        sizes = {name: size for name, size in self._full.shapes().items() if not self._is_other(name)}
        for key, (rows, columns) in self._sizes.items():
            long, short, kept = max(rows, columns), min(rows, columns), self._kept[key]
            low = short - kept
            sizes |= {f"{key}{U0}": (long, low), f"{key}{S0}": (low,), f"{key}{V0}": (low, short)}
            if long != short:
                sizes[f"{key}{PROTECTED}"] = (long, kept)
        return {name: (size, "float32") for name, size in sizes.items()}

    def split(self, weights: Weights) -> tuple[Weights, Weights]:
        """What trains in full and the zeros that A, s and B are at first; what stays, decomposed."""
        trained = {name: weight for name, weight in weights.items() if self._is_other(name)}
        frozen = {name: weight for name, weight in weights.items() if name not in trained}
        with self._console.progress("decomposing weights", total=len(self._kept), unit="weights") as advance:
            for key, kept in self._kept.items():
                frozen |= {f"{key}{part}": array for part, array in _cut(weights[key], kept).items()}
                advance(1)
        shapes = self.shapes()
        for key in self._kept:
            trained |= {name: np.zeros(shapes[name], np.float32) for name in _names(key)}
        self._console.say(
            f"osft: {len(self._kept)} matrices keep {sum(self._kept.values()):,} directions, and train "
            f"{sum(min(size) for size in self._sizes.values()) - sum(self._kept.values()):,}"
        )
        return trained, frozen

    def tensors(self, trained: Weights, frozen: Weights, formats: Mapping[str, str]) -> Weights:
        from training_hub.backends.jax_engine.spaces import merged

        dense = {name: np.asarray(weight) for name, weight in merged({**frozen, **trained}).items()}
        return self._full.tensors(dense, {}, formats)

    def write(self, tensors: Weights, folder: Path, dtype: str | None) -> None:
        self._full.write(tensors, folder, dtype)

    def read(self, folder: Path, console: Console) -> Weights:
        """The dense weights, which stand in the place of what was decomposed."""
        return self._full.read(folder, console)

    @property
    def protects(self) -> tuple[str, ...]:
        """The matrices of which a part is protected."""
        return tuple(self._kept)

    @property
    def decay(self) -> tuple[float, bool]:
        """The decay of U, S and V, which the optimizer does not know, and whether it stands apart from gradients."""
        return self._optimizer.weight_decay, self._optimizer.name in DECOUPLED


def rank_kept(side: int, ratio: float) -> int:
    """How many of `side` directions are protected: floor(side (1 - ratio)), and one less than all at most."""
    # 1 - 0.9 is a little less than 0.1: ten directions at ratio 0.9 keep one.
    return min(math.floor(side * (1 - ratio) + 1e-9), side - 1)


def _names(key: str) -> tuple[str, str, str]:
    return f"{key}{LEFT}", f"{key}{VALUES}", f"{key}{RIGHT}"


def _cut(weight: np.ndarray, kept: int) -> Weights:
    """The small part of a matrix, longer side first, in float32; decomposed in float64."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    u, s, v = np.linalg.svd(tall.astype(np.float64), full_matrices=False)
    parts = {U0: u[:, kept:], S0: s[kept:], V0: v[kept:]}
    if tall.shape[0] != tall.shape[1]:
        parts[PROTECTED] = u[:, :kept]
    return {name: np.ascontiguousarray(part, np.float32) for name, part in parts.items()}
