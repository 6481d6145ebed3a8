"""What a model says: answers to many prompts at once, and everything about the model as it was before.

Decoding is transformers' own `model.generate`, which knows the cache of every architecture; its streamer and its
GenerationConfig are enough, so there is no loop of ours to keep right beside it.

What is ours: rows sorted and batched by tokens, padding on the left only where the model at hand says the same with it,
and leaving no trace, so that a run that generates ends in the same bits as one that does not. benchmarks/generation.py
compares it with one row at a time, and with batches of rows as they come.
"""

# B batch, T tokens of prompts padded on the left, V vocabulary

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training_hub.backends.shared.answers import TOKENS_AT_ONCE, Advance, Answer, Decoding, Prompt, batches, cut
from training_hub.backends.torch_engine.as_forward import device_of, dtype_of
from training_hub.backends.torch_engine.attention import attention_of_transformers
from training_hub.backends.torch_engine.preflight import ROUGH, SAME_LOGITS, relative_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_LENGTHS = (5, 12)
"""Tokens of the two prompts on which padding is tried."""


def answers(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    tokens_at_once: int = TOKENS_AT_ONCE,
    advance: Advance = lambda count: None,
) -> list[Answer]:
    """One answer to each prompt, in their order; `advance` is told of each that is done."""
    found = share_of_answers(model, prompts, decoding, tokens_at_once, advance)
    return [found[number] for number in range(len(prompts))]


def share_of_answers(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    tokens_at_once: int = TOKENS_AT_ONCE,
    advance: Advance = lambda count: None,
    rank: int = 0,
    size: int = 1,
) -> dict[int, Answer]:
    """What process `rank` of `size` answers of these prompts, by their numbers; together they answer all, and say what
    one process says.

    Batches are groups of like length, padded to at most `tokens_at_once` tokens or holding one row. Equal prompts are
    asked once where nothing is drawn. With the likeliest tokens a row's answer does not depend on the batch it is in,
    but for rounding that decides between two tokens that are as likely as each other; so prompts are dealt out, and all
    processes are busy. What is drawn does depend on it, so then whole batches are.
    """
    is_drawn = decoding.temperature > 0
    order = range(len(prompts)) if is_drawn else by_length(prompts)[rank::size]
    if not order:
        return {}
    own, found = [prompts[number] for number in order], dict[int, Answer]()
    with serving(model):
        is_padded = len(own) > 1 and can_pad(model)
        groups = list(batches(own, tokens_at_once, is_padded, merges=not is_drawn))
        for group in groups[rank::size] if is_drawn else groups:
            asked = [own[places[0]] for places in group]
            given = _answer_batch(model, asked, decoding, _Counter(group, advance))
            for places, answer in zip(group, given, strict=True):
                found.update((order[place], answer) for place in places)
    return found


def by_length(prompts: Sequence[Prompt]) -> list[int]:
    """The numbers of the prompts, those with the shortest answers first, then the shortest."""
    return sorted(range(len(prompts)), key=lambda number: (prompts[number].limit, len(prompts[number].ids)))


@contextmanager
def serving(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model generates as it would by itself, afterwards it is as before, and so is what is random.

    Evaluation mode, so no dropout and no activation checkpointing; attention with a cache; none of the habits that its
    generation config may ask for. What a long answer made rotary embeddings grow to is put back too.
    """
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]
    grown = [
        (module, dict(module._buffers), module.max_seq_len_cached)
        for module in model.modules()
        if hasattr(module, "max_seq_len_cached")
    ]
    attention, habits = model.config._attn_implementation, model.generation_config
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            model.generation_config = GenerationConfig()
            # Ours keeps the documents of a pack apart and keeps nothing of what it has read.
            model.set_attn_implementation(attention_of_transformers(model))
            yield
        finally:
            model.set_attn_implementation(attention)
            model.generation_config = habits
            for module, was_training in modes:
                module.training = was_training
            for module, buffers, longest in grown:
                module._buffers.update(buffers)
                module.max_seq_len_cached = longest
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the cache of keys and values is gone; its blocks fit no step of training


def can_pad(model: PreTrainedModel) -> bool:
    """Whether the model says behind padding what it says without; tried on two random prompts, to the second token.

    Where it does not (state that runs through padding, positions that count it), only prompts of one length are asked
    together.
    """
    vocabulary = model.config.get_text_config().vocab_size
    random = np.random.default_rng(0)
    rows = [random.integers(0, vocabulary, length).tolist() for length in PROBE_LENGTHS]
    config = _config(Decoding(()), 2, output_logits=True, return_dict_in_generate=True)
    padded, alone = _generate(model, rows, config), _generate(model, rows[:1], config)
    limit = SAME_LOGITS.get(dtype_of(model), ROUGH)
    for place in range(2):
        if place and padded.sequences[0, -2] != alone.sequences[0, -2]:
            break  # two tokens as likely as each other: what follows is another text
        if not relative_difference(padded.logits[place][0].float(), alone.logits[place][0].float()) <= limit:
            return False
    return True


def stream(model: PreTrainedModel, prompt: Prompt, decoding: Decoding, hear: Callable[[int], None]) -> Answer:
    """The answer to one prompt; `hear` is told of each of its tokens as it is made."""
    with serving(model):
        return _answer_batch(model, [prompt], decoding, _Listener(hear))[0]


class _Listener:
    """A streamer that hands on the tokens of one answer, up to the one that ends it."""

    def __init__(self, hear: Callable[[int], None]):
        self._hear = hear
        self._is_over = False
        self.stop_ids: frozenset[int] = frozenset()

    def put(self, tokens: Tensor) -> None:
        if tokens.dim() > 1:
            return  # the prompt
        token = int(tokens[0])
        self._is_over = self._is_over or token in self.stop_ids
        if not self._is_over:
            self._hear(token)

    def end(self) -> None:
        pass


class _Counter:
    """A streamer: what transformers calls with each column of new tokens. Counts rows as they end."""

    def __init__(self, group: Sequence[Sequence[int]], advance: Advance):
        self._counts = [len(places) for places in group]
        self._advance = advance
        self.stop_ids: frozenset[int] = frozenset()

    def put(self, tokens: Tensor) -> None:
        if tokens.dim() > 1:
            return  # the prompts
        for row, token in enumerate(tokens.tolist()):
            if token in self.stop_ids and self._counts[row]:
                self._advance(self._counts[row])
                self._counts[row] = 0

    def end(self) -> None:
        self._advance(sum(self._counts))
        self._counts = [0] * len(self._counts)


def _answer_batch(
    model: PreTrainedModel, asked: Sequence[Prompt], decoding: Decoding, counter: _Counter | _Listener
) -> list[Answer]:
    counter.stop_ids = frozenset(decoding.stop_ids)
    config = _config(decoding, max(prompt.limit for prompt in asked))
    torch.manual_seed(decoding.seed)
    made = _generate(model, [prompt.ids for prompt in asked], config, counter)
    width = max(len(prompt.ids) for prompt in asked)
    return [cut(row[: one.limit], decoding) for row, one in zip(made[:, width:].tolist(), asked, strict=True)]


def _config(decoding: Decoding, limit: int, **more: Any) -> Any:
    from transformers import GenerationConfig

    drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.temperature else {}
    return GenerationConfig(
        max_new_tokens=limit,
        do_sample=decoding.temperature > 0,
        use_cache=True,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=decoding.stop_ids[0] if decoding.stop_ids else 0,
        **drawn,
        **more,
    )


def _generate(model: PreTrainedModel, rows: Sequence[Sequence[int]], config: Any, streamer: Any = None) -> Any:
    longest, device = max(map(len, rows)), device_of(model)
    ids_BT = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    with warnings.catch_warnings():
        # Of architectures whose config sets a limit of its own for generation: ours is what holds.
        warnings.filterwarnings("ignore", message="Both `max_new_tokens`")
        # Not in step with other processes, which whoever asks sees to for all passes at once (Layout.in_step).
        options = {"generation_config": config, "streamer": streamer, "synced_gpus": False}
        return model.generate(input_ids=ids_BT, attention_mask=mask_BT, **options)
