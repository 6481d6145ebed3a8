"""Answers in batches are those of one row at a time without cache, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from tests.backends.torch_engine.tiny_models import FAMILIES, VOCABULARY, from_config, tiny_config, tiny_model
from training_hub.backends.shared.answers import Answer, Decoding, Prompt, batches
from training_hub.backends.torch_engine.answers.generate import answers, can_pad, serving
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.checkpointing import checkpoint_layers

STOP = 7


def prompts(count: int = 9, seed: int = 0, limit: int = 12) -> list[Prompt]:
    random = np.random.default_rng(seed)
    return [Prompt(random.integers(3, VOCABULARY, 1 + 3 * number).tolist(), limit) for number in range(count)]


@torch.no_grad()
def one_by_one(model: Any, asked: Sequence[Prompt], stops: Sequence[int]) -> list[Answer]:
    """The likeliest token again and again, each time from the whole text: no batch, no padding, no cache."""
    model.eval()
    model.set_attn_implementation("eager")
    found = []
    for prompt in asked:
        ids: list[int] = list(prompt.ids)
        reason: Any = "length"
        for _ in range(prompt.limit):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                reason = "stop"
                break
            ids.append(token)
        found.append(Answer(tuple(ids[len(prompt.ids) :]), reason))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_row_alone_token_for_token(family: str):
    model = tiny_model(family)
    asked = prompts()
    found = answers(model, asked, Decoding((STOP, 2)))
    assert found == one_by_one(model, asked, (STOP, 2))
    assert len({answer.ids for answer in found}) > 4, "the answers must depend on the prompts"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_the_attention_of_training_hands_a_cached_call_on(family: str):
    """A model set to our attention generates by itself, padded, what it does row by row."""
    register_attention()
    model = tiny_model(family).eval()
    asked = prompts(5)
    wanted = one_by_one(model, asked, ())
    model.set_attn_implementation(DOCUMENTS)
    longest = max(len(one.ids) for one in asked)
    ids = torch.tensor([[0] * (longest - len(one.ids)) + list(one.ids) for one in asked])
    mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in asked])
    model.generation_config = transformers.GenerationConfig()
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert [tuple(row) for row in made[:, longest:].tolist()] == [answer.ids for answer in wanted]


class CountsPadding(nn.Module):
    """Around a model's embedding: shifts each token by how many columns stand before it, padding counted."""

    def __init__(self, inner: nn.Embedding):
        super().__init__()
        self.inner = inner
        self.num_embeddings = inner.num_embeddings
        self.weight = inner.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.inner(ids)
        return embedded + 0.3 * torch.arange(ids.shape[1])[:, None].sin()


def test_a_model_that_padding_changes_is_asked_in_groups_of_one_length():
    model = tiny_model("llama")
    assert can_pad(model.eval())
    model.model.embed_tokens = CountsPadding(model.model.embed_tokens)
    assert not can_pad(model.eval())
    asked = [*prompts(6), *prompts(6, seed=1)]
    together = answers(model, asked, Decoding((STOP,)))
    assert together == [answers(model, [one], Decoding((STOP,)))[0] for one in asked]


def test_a_state_space_model_answers_as_alone():
    model = from_config(
        transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
        )
    )
    asked = prompts(5)
    assert answers(model, asked, Decoding((STOP,))) == [answers(model, [one], Decoding((STOP,)))[0] for one in asked]


def test_nothing_of_the_model_or_of_what_is_random_has_changed_afterwards():
    register_attention()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = from_config(tiny_config("llama", max_position_embeddings=16, rope_parameters=rope))
    model.set_attn_implementation(DOCUMENTS)
    checkpoint_layers(model, "full")
    model.model.layers[1].eval()  # a part that somebody froze
    model.config.use_cache = False
    model.generation_config.temperature = 0.3
    habits = model.generation_config
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    made = answers(model, [Prompt([5] * 20, 30), Prompt([6] * 3, 30)], Decoding((), temperature=1.0, seed=3))
    assert torch.equal(torch.rand(3), wanted)
    assert [len(answer.ids) for answer in made] == [30, 30]
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == DOCUMENTS and model.generation_config is habits
    assert model.config.use_cache is False and model.model.layers[0].gradient_checkpointing
    assert model.model.rotary_emb.max_seq_len_cached == 16


def test_an_error_on_the_way_leaves_the_model_as_it_was_too():
    model = tiny_model("llama")
    own = model.config._attn_implementation

    def refuse(count: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers(model, prompts(), Decoding((STOP,)), advance=refuse)
    assert model.training and model.config._attn_implementation == own


def test_habits_of_a_generation_config_are_not_the_models_answers():
    model = tiny_model("llama")
    asked = prompts()
    wanted = answers(model, asked, Decoding((STOP,)))
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=3, min_new_tokens=11, eos_token_id=1
    )
    assert answers(model, asked, Decoding((STOP,))) == wanted


def test_an_answer_ends_at_any_stop_token_or_at_its_own_limit():
    model = tiny_model("llama")
    free = answers(model, prompts(), Decoding(()))
    assert all(answer.finish_reason == "length" and len(answer.ids) == 12 for answer in free)
    stops = (free[3].ids[2], free[5].ids[4])
    found = answers(model, [Prompt(one.ids, 3 + number) for number, one in enumerate(prompts())], Decoding(stops))
    for number, (answer, whole) in enumerate(zip(found, free, strict=True)):
        ends = [place for place, token in enumerate(whole.ids[: 3 + number]) if token in stops]
        wanted = whole.ids[: ends[0]] if ends else whole.ids[: 3 + number]
        assert answer == Answer(wanted, "stop" if ends else "length")
    assert {answer.finish_reason for answer in found} == {"stop", "length"}


def test_drawing_is_repeated_by_its_seed_and_changed_by_another():
    model = tiny_model("llama")
    first, again, other = (
        answers(model, prompts(), Decoding((STOP,), temperature=1.0, top_p=0.9, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first != answers(model, prompts(), Decoding((STOP,)))


def test_little_top_p_takes_the_likeliest_token():
    model = tiny_model("llama")
    drawn = answers(model, prompts(), Decoding((STOP,), temperature=1.0, top_p=1e-6))
    assert drawn == answers(model, prompts(), Decoding((STOP,)))


def test_equal_prompts_are_asked_once_and_answered_each():
    asked = [*prompts(4), *prompts(4)]
    told: list[float] = []
    found = answers(tiny_model("llama"), asked, Decoding((STOP,)), advance=told.append)
    assert found[:4] == found[4:]
    assert sum(told) == len(asked)
    assert sum(map(len, batches(asked, 10**6))) == 4


def test_every_prompt_is_in_one_batch_and_none_is_over_the_limit():
    asked = [Prompt([1] * (1 + 300 * place % 1700), 1 + place % 40) for place in range(1, 200)]
    groups = list(batches(asked, 4096))
    assert sorted(number for group in groups for places in group for number in places) == list(range(len(asked)))
    for group in groups:
        rows = [asked[places[0]] for places in group]
        size = max(len(one.ids) for one in rows) + max(one.limit for one in rows)
        assert len(group) == 1 or size * len(group) <= 4096
    assert 1 < len(groups) < 150


def test_progress_moves_within_a_batch():
    model = tiny_model("llama")
    stops = (answers(model, prompts(), Decoding(()))[4].ids[1],)
    told: list[float] = []
    answers(model, prompts(), Decoding(stops), advance=told.append)
    assert sum(told) == 9 and len(told) > 1


def test_serving_can_be_nested_in_code_that_wants_gradients():
    model = tiny_model("llama")
    with serving(model):
        assert not torch.is_grad_enabled() and not model.training
    assert torch.is_grad_enabled() and model.training
