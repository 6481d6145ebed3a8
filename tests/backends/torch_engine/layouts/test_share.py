"""What the plan counts of experts that are dealt out beside other ways is what a process gets of them."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.backends.torch_engine.tiny_models import tiny_config
from training_hub.backends.torch_engine.layouts.experts import experts_of
from training_hub.backends.torch_engine.layouts.share import Share, cut_down, held
from training_hub.recipe.parallelism import Parallelism


@pytest.mark.parametrize(
    ("shards", "heads", "experts", "among"), [(8, 1, 8, 8), (8, 1, 2, 8), (4, 2, 8, 8), (2, 4, 2, 8), (1, 8, 1, 8)]
)
def test_experts_are_counted_once_however_they_are_dealt_out(shards, heads, experts, among):
    with torch.device("meta"):
        config = tiny_config("qwen3-moe", num_experts=16, num_attention_heads=8, num_key_value_heads=8)
        blank = transformers.AutoModelForCausalLM.from_config(config)
    asked = Parallelism(data_parallel_shard_degree=shards, tensor_parallel_degree=heads, expert_parallel_degree=experts)
    whole = sum(weight.numel() for _, module in experts_of(blank) for weight in module.parameters(recurse=False))
    modules = [module for _, module in experts_of(blank)]
    share = Share.of(asked, 8)
    apart = cut_down(blank, share)
    found = sum(held(weight, share, apart).numel() for module in modules for weight in module.parameters(recurse=False))
    assert found * among == whole
