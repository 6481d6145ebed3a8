"""Checks on the loaded model before the first step, small enough to be run every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training_hub.backends.torch_engine.as_forward import device_of
from training_hub.backends.torch_engine.tensors import PackTensors, Term, to_device
from training_hub.types import Console, Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME_LOGITS = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest `attention_difference` that is rounding; ROUGH for 16-bit numbers, in which layers add up theirs and a router
may choose another expert. Measured on random models of two layers: up to 1e-6 in float32 and 0.08 in bfloat16, and 1
with a wrong mask."""

ROUGH = 0.3

# Relative difference of packed and separate losses that rounding explains, by format.
PACKING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}

LENGTHS = (7, 12, 5)
"""Tokens of the documents that are tried: uneven, and longer than the convolutions of hybrid models reach."""


Objective = Callable[[Any, PackTensors], Term]


def can_pack(model: Any, objective: Any, dtype: torch.dtype, console: Console) -> bool:
    """Whether this model keeps packed samples apart; says so where it does not."""
    difference = packed_equals_alone(model, objective, model.config.get_text_config().vocab_size)
    if difference <= PACKING_TOLERANCE[dtype]:
        return True
    console.say(
        f"model: packed samples would see each other (losses differ by {difference:.1e}), so each sample runs alone"
    )
    return False


@torch.no_grad()
def packed_equals_alone(model: PreTrainedModel, objective: Objective, vocab_size: int) -> float:
    """Largest relative difference between the loss of a document within a pack and of the same document alone.

    Three short random documents; the pack is run once per document, with only that document trained, so that errors
    cannot cancel in a sum. Infinite where the model refuses a pack, as linear attention in transformers does when its
    kernels are not installed. Measured on random models: up to 1e-7 in float32 and 0 in bfloat16 where attention keeps
    documents apart, 0.05 to 0.2 where state leaks; such a model must be run with one document per pack.
    """
    documents = _random_documents(vocab_size)
    device = device_of(model)
    with evaluating(model):
        alone = [float(objective(model, to_device(_pack([each], trained=0), device)).total) for each in documents]
        try:
            packs = [to_device(_pack(documents, trained=index), device) for index in range(len(documents))]
            packed = [float(objective(model, pack).total) for pack in packs]
        except ValueError:
            return float("inf")
    return max(abs(one - other) / abs(one) for one, other in zip(alone, packed, strict=True))


@torch.no_grad()
def attention_difference(model: PreTrainedModel) -> float:
    """How far the model's logits under its present attention lie from those under transformers' plain one.

    Norm of the difference over the norm of the plain logits, for one random document of 24 tokens.
    """
    present = model.config._attn_implementation
    ours = logits_of_one(model)
    model.set_attn_implementation("eager")
    try:
        plain = logits_of_one(model)
    finally:
        model.set_attn_implementation(present)
    return relative_difference(ours, plain)


@torch.no_grad()
def logits_of_one(model: PreTrainedModel) -> Tensor:
    """The model's logits for one random document of 24 tokens, in float32."""
    ids = torch.from_numpy(_random_documents(model.config.get_text_config().vocab_size, (24,))[0])[None]
    with evaluating(model):
        return model(input_ids=ids.to(device_of(model)), use_cache=False).logits.float()


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model is in evaluation mode (no dropout); afterwards it is as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _random_documents(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length) for length in lengths]


def _pack(documents: Sequence[np.ndarray], trained: int) -> Pack:
    """The documents end to end; all but the first token of document `trained` have weight 1."""
    boundaries = np.cumsum([0, *(len(document) for document in documents)])
    weights = np.zeros(boundaries[-1], dtype=np.float32)
    weights[boundaries[trained] + 1 : boundaries[trained + 1]] = 1
    return Pack(
        ids=np.concatenate(documents).astype(np.int32),
        positions=np.concatenate([np.arange(len(document), dtype=np.int32) for document in documents]),
        weights=weights,
        boundaries=boundaries.astype(np.int32),
        samples=np.arange(len(documents), dtype=np.int64),
    )
