"""Proofs before the first step, as far as they need no model: text, stop tokens, verdicts, and what is tried on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from training_hub.data.agreement import Agreement
from training_hub.data.packing import pack
from training_hub.data.store import TokenStore
from training_hub.errors import TrainingError
from training_hub.types import Pack, Proof, Sample

SAMPLES = 4
TOKENS_OF_SAMPLE = 64
"""What the numeric proofs run on: the ends of the first samples. Enough to show an error, little for a large model."""

SAMPLES_FOR_STOP = 1000

SMALL_RATE = 1e-6
"""The learning rate at which bfloat16 weights without float32 masters do not move: 1e-6 is far below half a unit in
the last place of a weight of 0.02."""

MOVED = dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Lion", "AdamWScheduleFree"), 0.9)
"""Share of weights with a gradient that must move; others (SGD) move by rate x gradient, so that some must."""


def refuse(proofs: Sequence[Proof]) -> None:
    """Raise TrainingError naming each proof that failed, its number and what to do."""
    problems = [
        f"preflight: {each.name}: found {each.measured}, allowed {each.limit}. {each.remedy}"
        for each in proofs
        if each.status == "fails"
    ]
    if problems:
        raise TrainingError(problems)


def text_proof(found: Agreement) -> Proof:
    """That the trained tokens are, character for character, what the rows say."""
    name, limit = "trained text is what the rows say", "0 rows differ"
    if found.reason:
        return Proof(name, "left out", "", limit, found.reason)
    share = found.trained_tokens / max(1, found.tokens)
    measured = f"{len(found.problems)} of {found.rows} rows differ ({share:.0%} of {found.tokens:,} tokens trained)"
    remedy = ""
    if found.problems:
        shown = "; ".join(found.problems[:3])
        remedy = f"{shown}. Look at these rows, or give the template the model is served with: data.chat_template."
    return Proof(name, "fails" if found.problems else "holds", measured, limit, remedy)


def stop_proofs(ends: Counter[int] | None, stops: set[int], ending_ids: Sequence[int]) -> list[Proof]:
    """Whether the last trained token of a sample is one that ends text, and whether generate() will stop there.

    ends: the last trained tokens of samples; None where samples are blocks of pretraining. stops: where generate()
    stops. ending_ids: every token that is special to the tokenizer. A template without a stop token is a choice some
    make: it is said and stops nothing.
    """
    names = ("samples end in a trained stop token", "generation stops at what was trained")
    if ends is None:
        return [Proof(name, "left out", "", "", "blocks of pretraining have no ends") for name in names]
    ending = {token: count for token, count in ends.items() if token in {*ending_ids, *stops}}
    share, limit = sum(ending.values()) / ends.total(), "at least 50 %"
    if share < 0.5:
        remedy = "the model will hardly learn to stop: give a template that ends each answer with its stop token."
        return [Proof(names[0], "fallback", f"{share:.1%} of {ends.total():,} samples", limit, remedy)]
    stopped = sum(count for token, count in ending.items() if token in stops) / sum(ending.values())
    remedy = (
        f"generation stops at {sorted(stops)}, trained are {sorted(ending)}: set eos_token_id in the model's folder."
    )
    return [
        Proof(names[0], "holds", f"{share:.1%} of {ends.total():,} samples", limit),
        Proof(
            names[1],
            "holds" if stopped >= 0.5 else "fails",
            f"{stopped:.1%} of these; stops at {', '.join(map(str, sorted(stops)))}",
            limit,
            "" if stopped >= 0.5 else remedy,
        ),
    ]


def last_trained(store: TokenStore) -> Counter[int]:
    """How often each token is the last trained one of the first samples."""
    samples = (store[index] for index in range(min(len(store), SAMPLES_FOR_STOP)))
    return Counter(int(sample.ids[int(np.flatnonzero(sample.weights)[-1])]) for sample in samples)


def compared(name: str, loss: float, gradient: float, limit: float, remedy: str) -> Proof:
    """The proof about two ways to a loss and its gradient, from their relative differences."""
    holds = loss <= limit and gradient <= 10 * limit
    measured, allowed = f"loss {loss:.1e}, gradient {gradient:.1e}", f"loss {limit:.0e}, gradient {10 * limit:.0e}"
    return Proof(name, "holds" if holds else "fails", measured, allowed, "" if holds else remedy)


def excerpt(sample: Sample) -> Sample:
    """The last TOKENS_OF_SAMPLE tokens up to the last trained one, with weights of at most 1."""
    end = int(np.flatnonzero(sample.weights)[-1]) + 1
    part = slice(max(0, end - TOKENS_OF_SAMPLE), end)
    weights = np.array(sample.weights[part])
    return Sample(np.array(sample.ids[part]), weights / weights.max(), sample.origin)


def alone(excerpts: Sequence[Sample]) -> list[Pack]:
    """Each sample as a pack of its own."""
    return [pack([one], [number]) for number, one in enumerate(excerpts)]


def relative(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference of two lists of numbers."""
    return max(abs(one - other) / max(abs(other), 1e-12) for one, other in zip(found, wanted, strict=True))
