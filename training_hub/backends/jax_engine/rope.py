"""Frequencies of rotary positions, as transformers scales them for long texts.

Only the formulas that depend on nothing but the config are here: `dynamic` and `longrope` depend on the length of what
is read, which one compiled step for many documents cannot follow.
"""

# d half the width of a head

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Scaled = tuple[np.ndarray, float]
"""Frequencies [d] float32, and what cosine and sine are multiplied by."""


def frequencies(rope: Mapping[str, Any], head_dim: int, positions: int | None) -> Scaled:
    """The frequencies that a config's rope_parameters state for heads of `head_dim` numbers."""
    base = np.float32(rope["rope_theta"])
    plain_d = np.float32(1) / base ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    scale = ROPE_TYPES[rope.get("rope_type", "default")]
    found_d, factor = scale(plain_d, rope, head_dim, positions)
    return found_d.astype(np.float32), factor


def _default(plain_d: np.ndarray, rope: Mapping[str, Any], head_dim: int, positions: int | None) -> Scaled:
    return plain_d, 1.0


def _linear(plain_d: np.ndarray, rope: Mapping[str, Any], head_dim: int, positions: int | None) -> Scaled:
    return plain_d / np.float32(rope["factor"]), 1.0


def _llama3(plain_d: np.ndarray, rope: Mapping[str, Any], head_dim: int, positions: int | None) -> Scaled:
    """Low frequencies are divided by `factor`, high ones stay, those between are a mixture.

    Source: transformers 5.23 `_compute_llama3_parameters`, which follows the code released with Llama 3.1.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope.get("original_max_position_embeddings") or positions
    turns_d = length * plain_d / np.float32(2 * math.pi)  # how often each turns around within the original length
    share_d = np.clip((turns_d - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - share_d) * plain_d / np.float32(rope["factor"]) + share_d * plain_d, 1.0


def _yarn(plain_d: np.ndarray, rope: Mapping[str, Any], head_dim: int, positions: int | None) -> Scaled:
    """Frequencies that turn often within the original length stay, others are divided by `factor`, with a ramp between.

    Source: Peng et al. 2023, arXiv:2309.00071, and transformers 5.23 `_compute_yarn_parameters`.
    """
    length = rope["original_max_position_embeddings"]
    factor = rope["factor"] if rope.get("factor") is not None else (positions or length) / length

    def dimension(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp_d = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept_d = 1 - np.clip(ramp_d, 0, 1)
    return plain_d / np.float32(factor) * (1 - kept_d) + plain_d * kept_d, _yarn_factor(rope, factor)


def _yarn_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


ROPE_TYPES: Mapping[str, Callable[[np.ndarray, Mapping[str, Any], int, int | None], Scaled]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
