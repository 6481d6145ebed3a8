"""The fastest attention that is right is taken; one that is wrong or fails is left out, and said to be."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.backends.torch_engine.tiny_models import FAMILIES, tiny_config
from training_hub.backends.torch_engine.attention import CUDNN, DOCUMENTS, FUNCTIONS, VARLEN
from training_hub.backends.torch_engine.attention_trial import TIMED_TOKENS, Heads, _filled, heads_of, told, try_each

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 16)


def across_documents(module, query, key, value, mask, scaling, **kwargs):
    """Causal attention over the whole pack: right for one document only."""
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def without_a_kernel(module, query, key, value, mask, **kwargs):
    """What torch raises where it is left no kernel that does masks on a CPU."""
    return scaled_dot_product_attention(query, key[:, :1], value[:, :, :3], scale=1.0), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_attention_of_ours_passes_on_this_machine(dtype):
    trials = try_each(FUNCTIONS, HEADS, (50, 70), CPU, dtype)
    assert {trial.name for trial in trials} == {DOCUMENTS, VARLEN, CUDNN}
    assert all(trial.problem is None and trial.seconds > 0 for trial in trials)
    assert [trial.seconds for trial in trials] == sorted(trial.seconds for trial in trials)


def test_attention_across_documents_and_one_that_fails_are_left_out_and_named():
    candidates = {"across": across_documents, "none": without_a_kernel, DOCUMENTS: FUNCTIONS[DOCUMENTS]}
    trials = try_each(candidates, HEADS, (50, 70), CPU, torch.float32)
    assert trials[0].name == DOCUMENTS
    assert {trial.name for trial in trials[1:]} == {"across", "none"}
    assert all(trial.seconds is None for trial in trials[1:])
    said = told(trials)
    assert "across is left out: its results differ" in said and "none is left out: RuntimeError" in said


def test_as_many_documents_are_timed_as_fill_the_pack():
    assert _filled([100] * 500) == (100,) * (TIMED_TOKENS // 100)
    assert _filled([]) == _filled([TIMED_TOKENS + 1]) == (TIMED_TOKENS,)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_those_of_the_config_or_none(family):
    config = tiny_config(family)
    heads = heads_of(config)
    if family == "deepseek-v3":
        assert heads is None
        return
    assert heads.query == config.num_attention_heads and heads.query % heads.key == 0
    assert heads.width == (getattr(config, "head_dim", None) or config.hidden_size // heads.query)
