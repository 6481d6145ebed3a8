"""The operations that the meter counts are those that torch multiplies, and measuring the peak disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.planning.work import Scale, Work, measured_peak, pairs_seen, work_of

LENGTH = 24


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "mistral", "phi3"])
def test_operations_are_those_that_torch_counts(family: str):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    work = work_of(model)
    # Eager attention multiplies every pair of tokens, and its head every token; those are what is left out otherwise.
    dense = sum(each for each, _ in work.per_pair) * LENGTH**2
    # The rotary frequencies are a product, too: a few operations per token and width of a head.
    expected = (work.per_token + work.per_trained_token) * LENGTH + dense
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


def test_a_frozen_matrix_costs_two_thirds():
    model = tiny_model("llama")
    trained = work_of(model)
    model.requires_grad_(False)
    frozen = work_of(model)
    assert frozen.per_token / trained.per_token == pytest.approx(2 / 3)
    assert frozen.per_pair == trained.per_pair


def test_of_experts_those_count_that_a_token_is_sent_to():
    model = tiny_model("mixtral")
    config = model.config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = 6 * experts * (1 - config.num_experts_per_tok / config.num_local_experts)
    assert 0 < unused < 6 * experts
    config.num_experts_per_tok = config.num_local_experts
    assert work_of(model).per_token - unused == pytest.approx(work_of(tiny_model("mixtral")).per_token)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_pairs_are_counted_as_if_one_by_one(window: int | None):
    for length in (1, 2, 3, 7):
        seen = [(t, s) for t in range(length) for s in range(t + 1) if window is None or t - s < window]
        assert pairs_seen(length, window) == len(seen)


def test_a_pack_needs_what_its_samples_need():
    work = Work(per_token=10, per_trained_token=100, per_pair=((1.0, None), (2.0, 2)))
    pack = random_pack((4, 1, 3))
    trained = int((pack.weights != 0).sum())
    pairs, windowed = 10 + 1 + 6, 7 + 1 + 5
    assert work.operations([pack]) == 10 * 8 + 100 * trained + pairs + 2 * windowed
    assert Scale(work, peak=1000.0).fraction([pack], 2.0) == work.operations([pack]) / 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_measuring_the_peak_leaves_the_random_numbers_as_they_are(dtype: torch.dtype):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert measured_peak(torch.device("cpu"), dtype) > 1e6
    assert torch.equal(torch.rand(3), expected)
