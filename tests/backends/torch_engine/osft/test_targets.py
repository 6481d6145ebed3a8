"""Targets are found by what a module is and where it stands; matrices are cut as their forward uses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.backends.torch_engine.tiny_models import FAMILIES, tiny_model
from training_hub.backends.torch_engine.adaptations.osft.optimizer import OsftOptimizer
from training_hub.backends.torch_engine.adaptations.osft.targets import find_targets
from training_hub.errors import RecipeError

PLAIN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LEAVES = {
    "llama": PLAIN,
    "llama-tied": PLAIN,
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt-oss": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
}


def leaf(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_matrices_of_its_blocks_cut_and_nothing_else(family):
    model = tiny_model(family)
    names = [target.parameter_name for target in find_targets(model)]
    assert len(names) == len(set(names))
    if family in LEAVES:
        assert {leaf(name) for name in names} == LEAVES[family]
        assert len(names) == len(LEAVES[family]) * 2 + (2 if family == "gpt2" else 0)
    head = model.get_output_embeddings().weight
    for target in find_targets(model):
        assert target.parameter is not head
        assert not any(word in target.name for word in ("norm", "embed", "wte", "router", "bias", "gate.weight"))


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 27)[None]
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("form", ["factors", "core"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gpt-oss", "deepseek-v3"])
def test_every_layout_learns_and_keeps_what_is_protected(family, form):
    model = tiny_model(family)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    optimizer = OsftOptimizer(model, torch.optim.AdamW, unfreeze_rank_ratio=0.25, form=form, others="freeze", lr=2e-3)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert optimizer.metrics()["osft_leak"] < 1e-6
    for one in optimizer.spaces.spaces:
        target = one.target
        start = target.view(before[target.parameter_name])
        moved = target.view(target.parameter.detach().double()) - start
        kept = one.target.short_side - one.trained.split.left.shape[-1]
        u, _, v = torch.linalg.svd(start, full_matrices=False)
        for inside in (u[..., :kept].mT @ moved, moved @ v[..., :kept, :].mT):
            # float32 weights up to 1: each step rounds them by 6e-8.
            assert inside.norm() < 1e-4 * moved.norm() + 1e-6 * moved.numel() ** 0.5
        assert moved.norm() > 0


def test_patterns_choose_by_parts_of_names():
    names = [target.name for target in find_targets(tiny_model("llama"), ["o_proj", "layers.1.mlp"])]
    assert {leaf(name) for name in names} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 5


@pytest.mark.parametrize("patterns", [["o_proj", "out_proj"], []])
def test_a_pattern_that_matches_nothing_is_an_error_with_the_names_that_exist(patterns):
    with pytest.raises(RecipeError, match=r"target_patterns.*model\.layers\.0\.self_attn\.q_proj\.weight"):
        find_targets(tiny_model("llama"), patterns)


def test_a_model_without_linear_layers_in_blocks_is_an_error():
    with pytest.raises(RecipeError, match=r"no linear layer inside its blocks.*0\.weight"):
        find_targets(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("phi3", {"qkv_proj": [32, 16, 16], "gate_up_proj": [48, 48]}),
        ("gpt2", {"c_attn": [32, 32, 32]}),
        ("mixtral", {"gate_up_proj": [48, 48]}),
    ],
)
def test_fused_projections_can_be_cut_one_by_one(family, parts):
    model = tiny_model(family)
    found = find_targets(model, splits_fused=True)
    for name, lengths in parts.items():
        cut = [target for target in found if name in target.name and "0" in target.name.split(".")]
        assert [target.length for target in cut] == lengths
        whole = cut[0].parameter.detach()
        views = [target.parameter.narrow(target.axis, target.start, target.length) for target in cut]
        assert torch.equal(torch.cat(views, dim=cut[0].axis), whole)
    optimizer = OsftOptimizer(model, torch.optim.AdamW, unfreeze_rank_ratio=0.25, split_fused=True, lr=1e-3)
    first = loss_of(model)
    first.backward()
    optimizer.step()
    assert loss_of(model) < first
    assert optimizer.metrics()["osft_leak"] < 1e-6


def test_interleaved_projections_are_refused_in_words():
    with pytest.raises(RecipeError, match=r"interleaved.*osft\.split_fused: false"):
        find_targets(tiny_model("gpt-oss"), splits_fused=True)
