"""Which attention is fastest here: each that could be used is checked against a plain formula, then timed.

Done once at the start of a run on a GPU, on random heads in the shape of the model and documents as long as its rows.
"""

# T tokens of a pack, Q query heads, K key-value heads, D width of a head

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

Attention = Callable[..., tuple[Tensor, Any]]

CHECKED = (129, 300, 1, 64)
"""Tokens of the documents on which results are compared: about the borders of a kernel's blocks, and one alone."""

TIMED_TOKENS = 16384
"""The timed pack is filled with documents up to so many tokens."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference that is rounding, as a share of the norm. A document that sees another one is off by about 1."""

ROUNDS = 5


@dataclass(frozen=True)
class Heads:
    """The heads of a model: `query` and `key` are how many, `width` is how wide each is."""

    query: int
    key: int
    width: int


@dataclass(frozen=True)
class Trial:
    """What one attention did: seconds of forward and backward for one layer, or the problem that rules it out."""

    name: str
    seconds: float | None
    problem: str | None = None


def heads_of(config: Any) -> Heads | None:
    """The heads that a transformers config states; None where it has no plain ones."""
    query = getattr(config, "num_attention_heads", None)
    if not isinstance(query, int) or getattr(config, "kv_lora_rank", None) is not None:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(query, getattr(config, "num_key_value_heads", None) or query, width)


def try_each(
    candidates: Mapping[str, Attention], heads: Heads, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> list[Trial]:
    """Every candidate, the fastest first, those that fail or say something else last.

    lengths: tokens of documents, of which as many are timed as fill TIMED_TOKENS.
    """
    timed = _filled(lengths)
    trials = [_try(name, attend, heads, timed, device, dtype) for name, attend in candidates.items()]
    return sorted(trials, key=lambda trial: float("inf") if trial.seconds is None else trial.seconds)


def told(trials: Sequence[Trial]) -> str:
    """The outcome in one line."""
    used = [f"{trial.name} {trial.seconds * 1000:.2f} ms" for trial in trials if trial.seconds is not None]
    out = [f"{trial.name} is left out: {trial.problem}" for trial in trials if trial.seconds is None]
    return "; ".join([f"attention of one layer and pack, tried here: {', '.join(used) or 'none can be used'}", *out])


def _filled(lengths: Sequence[int]) -> tuple[int, ...]:
    ends = list(accumulate(lengths))
    return tuple(length for length, end in zip(lengths, ends, strict=True) if end <= TIMED_TOKENS) or (TIMED_TOKENS,)


def _try(
    name: str, attend: Attention, heads: Heads, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Trial:
    try:
        difference = _difference(attend, heads, device, dtype)
        if not difference <= TOLERANCE.get(dtype, 1e-6):
            return Trial(name, None, f"its results differ by {difference:.1e}")
        return Trial(name, _seconds(attend, heads, lengths, device, dtype))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        # What kernels raise for shapes, devices and versions they do not know; the message says which.
        lines = str(error).strip().splitlines()
        return Trial(name, None, f"{type(error).__name__}: {lines[0] if lines else ''}")


def _difference(attend: Attention, heads: Heads, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of result and gradients from a plain formula in float32 (float64 for float64)."""
    inputs = _random(heads, sum(CHECKED), device, dtype)
    exact = [one.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for one in inputs]
    found, wanted = _call(attend, inputs, CHECKED), _plain(exact, CHECKED)
    upstream = torch.randn_like(found)
    ours = (found.detach(), *torch.autograd.grad(found, inputs, upstream))
    right = (wanted.detach(), *torch.autograd.grad(wanted, exact, upstream.to(wanted.dtype)))
    return max(float((one - other).norm() / other.norm()) for one, other in zip(ours, right, strict=True))


def _seconds(
    attend: Attention, heads: Heads, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> float:
    inputs = _random(heads, sum(lengths), device, dtype)
    taken = []
    for _ in range(1 + ROUNDS):  # the first one also chooses and builds kernels
        _wait(device)
        began = time.perf_counter()
        found = _call(attend, inputs, lengths)
        torch.autograd.grad(found, inputs, torch.ones_like(found))
        _wait(device)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(heads: Heads, tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries [1, Q, T, D], keys and values [1, K, T, D], laid out as models lay them out."""
    draw = torch.Generator(device).manual_seed(0)
    counts = (heads.query, heads.key, heads.key)
    drawn = (torch.randn(1, tokens, count, heads.width, generator=draw, device=device) for count in counts)
    return [one.to(dtype).transpose(1, 2).requires_grad_() for one in drawn]


def _call(attend: Attention, inputs: Sequence[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """What the candidate makes of a pack: [1, T, Q, D]."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=inputs[0].device)
    query, key, value = inputs
    output, _ = attend(
        nn.Module(), query, key, value, None, scaling=query.shape[-1] ** -0.5, document_lengths=lengths,
        cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=max(lengths), max_length_k=max(lengths),
    )  # fmt: skip
    return output


def _plain(inputs: Sequence[Tensor], lengths: tuple[int, ...]) -> Tensor:
    query, key, value = inputs
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    sizes = torch.tensor(lengths, device=query.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), sizes)
    sees = (document[:, None] == document) & torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    return (scores.masked_fill(~sees, float("-inf")).softmax(-1) @ value).transpose(1, 2)
