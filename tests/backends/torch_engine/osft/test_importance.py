"""Ranks by importance are those of a computation by hand: from hidden states that transformers gives out itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.torch_engine.osft.test_runs import train
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.osft.importance import shares_kept
from training_hub.errors import RecipeError

TEXTS = ["the river is wide", "a tiger is not a lemon", "paper and light"]


@pytest.fixture
def general(tmp_path) -> Path:
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def asked(general: Path, **osft: object) -> dict[str, dict[str, object]]:
    ratio = {"unfreeze_rank_ratio": 0.4, "importance": True, **osft}
    return {"osft": ratio, "evaluation": {"watch": str(general)}, "training": {"preflight": False}}


def test_each_block_keeps_what_the_rule_gives_by_hand(tiny_model_folder, chat_file, general, tmp_path):
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **asked(general, least_kept=0.2, carry=True))
    # By hand: hidden states before and after each block, of each text alone, as transformers gives them.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    states: list[list[torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda module, given, out: states[-1].extend([given[0], _first(out)]))
        for layer in model.model.layers
    ]
    for text in TEXTS:
        states.append([])
        with torch.no_grad():
            model(torch.tensor([[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]))
    for hook in hooks:
        hook.remove()
    cosines = []
    for block in range(len(model.model.layers)):
        before, after = (torch.cat([one[2 * block + side][0] for one in states]).double() for side in (0, 1))
        cosines.append(((before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)).mean().item())
    mean = sum(cosines) / len(cosines)
    assert max(cosines) - min(cosines) > 0.01, "else every block keeps the same, and nothing is shown"
    state = load_file(result.model_path / "osft_state.safetensors")
    for name, weight in model.state_dict().items():
        if f"{name}.right" in state:
            share = 0.2 + cosines[int(name.split(".")[2])] / mean * (0.6 - 0.2)
            side = min(weight.shape)
            assert len(state[f"{name}.right"]) == side - int(side * share), name


def _first(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def test_shares_average_to_the_target_and_stay_within_their_bounds():
    shares = shares_kept({"a": 0.9, "b": 0.6, "c": 0.3}, 0.1, 0.7)
    assert shares == pytest.approx({"a": 0.1 + 1.5 * 0.6, "b": 0.7, "c": 0.4})
    assert sum(shares.values()) / 3 == pytest.approx(0.7)
    assert shares_kept({"a": 1.0, "b": 0.1, "c": -0.5}, 0.1, 0.8) == pytest.approx({"a": 1, "b": 0.45, "c": 0.1})
    with pytest.raises(RecipeError, match="mean cosine"):
        shares_kept({"a": -0.5, "b": 0.1}, 0.1, 0.8)


@pytest.mark.parametrize(
    ("osft", "watch", "message"),
    [
        ({}, None, r"measured on the rows of evaluation\.watch, which is not given"),
        ({"unfreeze_rank_ratio": None, "energy": 0.5}, "general.jsonl", "shares out .* which is null"),
        ({"unfreeze_rank_ratio": 1.0}, "general.jsonl", "which is 1.0; allowed: between 0 and 1"),
        ({"least_kept": 0.9}, "general.jsonl", r"least_kept: found 0\.9, but .* keep 0\.6 on average"),
        ({"importance": False, "least_kept": 0.2}, "general.jsonl", r"osft\.least_kept: 0\.2 would change nothing"),
    ],
)
def test_importance_without_what_it_needs_is_refused(osft, watch, message, tiny_model_folder, chat_file, tmp_path):
    sections = asked(Path("general.jsonl"), **osft)
    sections["evaluation"] = {"watch": watch}
    with pytest.raises(ValueError, match=message):
        recipe(tiny_model_folder, chat_file, tmp_path / "run", algorithm="osft", **sections)
