"""How well a model does rows that it was not trained on: answers generated and compared, and the loss on the answers.

Prompt and answer are those of training: what stands before the last trained stretch of a row, token by token, and that
stretch. So any row format and any chat template can be scored, and nothing is asked otherwise than it was taught.
"""

# B batch, T tokens of prompts, padded on the left

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training_hub.backends import Given
from training_hub.backends.torch_engine.materials import Materials, load_materials, stop_ids
from training_hub.backends.torch_engine.model import choose_device, choose_dtype, load_model
from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy
from training_hub.backends.torch_engine.plan import feed_settings
from training_hub.backends.torch_engine.preflight import can_pack
from training_hub.backends.torch_engine.processor import prepare_processor
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.data.feed import validation_packs
from training_hub.data.store import TokenStore
from training_hub.evaluation.metrics import exact_match
from training_hub.recipe import Recipe
from training_hub.types import Console

TOKENS_AT_ONCE = 16384  # of prompts and answers together, padding included


@dataclass(frozen=True)
class Question:
    """Token ids of what is asked and of the answer wanted, which may end with a token that ends the turn."""

    prompt: list[int]
    answer: list[int]


@torch.no_grad()
def score(recipe: Recipe, console: Console, *, generates: bool) -> dict[str, float]:
    """Scores of the model of model.path on the rows of data.path: `loss`, `rows`, and `exact_match` where it generates.

    loss: the mean over all trained tokens, in nats. exact_match: the share of rows whose greedily generated answer is
    the reference's, letter by letter but for white space around it, and ends where it does.
    """
    materials = load_materials(recipe, Given(), console)
    device = choose_device()
    prepare_processor(device)
    dtype = choose_dtype(recipe.model.dtype, device)
    model = load_model(recipe, device, dtype).model
    store = materials.prepared.train
    found = {"rows": float(len(store)), "loss": _mean_loss(recipe, model, store, device, console)}
    if generates:
        found["exact_match"] = _share_right(model, materials, console, device)
    return found


def _mean_loss(recipe: Recipe, model: Any, store: TokenStore, device: torch.device, console: Console) -> float:
    objective, _ = cross_entropy(model)
    is_packed = recipe.data.packing and can_pack(model, objective, model.dtype, console)
    settings = feed_settings(recipe, int(store.lengths.max()), device, is_packed)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for one in validation_packs(store, settings.token_budget, settings.is_packed):
        total += objective(model, to_device(one, device)).total
    return float(total) / float(store.trained_weight.sum())


def _share_right(model: Any, materials: Materials, console: Console, device: torch.device) -> float:
    store, stops = materials.prepared.train, stop_ids(materials)
    questions = [question(store[index].ids, store[index].weights) for index in range(len(store))]
    # Ours attends within documents of a pack, and keeps nothing of what it has read.
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    said: list[str] = []
    wanted: list[str] = []
    with console.progress("answering", total=len(questions), unit="rows") as advance:
        for asked in batches(questions):
            answers = generate(model, asked, stops, device)
            said += [_text(ids, stops, materials) for ids in answers]
            wanted += [_text(one.answer, stops, materials) for one in asked]
            advance(len(asked))
    return exact_match(said, wanted)


def question(ids: np.ndarray, weights: np.ndarray) -> Question:
    """A row as it is asked: `ids` [T] and `weights` [T], cut before the last stretch of trained tokens."""
    trained = np.flatnonzero(weights)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
    return Question(ids[:start].tolist(), ids[start : int(trained[-1]) + 1].tolist())


def batches(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """The questions, shortest answers first, in groups that are padded to at most TOKENS_AT_ONCE or hold one."""
    group: list[Question] = []
    for one in sorted(questions, key=lambda each: (len(each.answer), len(each.prompt))):
        longer = [*group, one]
        size = max(len(each.prompt) for each in longer) + max(len(each.answer) for each in longer)
        if group and size * len(longer) > TOKENS_AT_ONCE:
            yield group
            longer = [one]
        group = longer
    if group:
        yield group


def generate(model: Any, asked: Sequence[Question], stops: Sequence[int], device: torch.device) -> list[list[int]]:
    """What the model says to each question, taking the likeliest token each time, up to one more than is wanted."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # its own may ask for sampling, or for a penalty on repetition
    longest = max(len(one.prompt) for one in asked)
    ids_BT = torch.tensor([[0] * (longest - len(one.prompt)) + one.prompt for one in asked], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in asked], device=device)
    made = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=max(len(one.answer) for one in asked) + 1,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
    )
    return made[:, longest:].tolist()


def _text(ids: Sequence[int], stops: Sequence[int], materials: Materials) -> str:
    """The text up to the first token that ends a turn; with a mark behind it where there is one, so that an answer
    that goes on is not taken for one that ends."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    text = materials.tokenizer.hf.decode(ids[:end]).strip()
    return text if end == len(ids) else f"{text}\N{END OF TRANSMISSION}"
