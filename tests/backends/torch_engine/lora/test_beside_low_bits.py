"""Every adapter beside a base of 4 or 8 bits is what it is beside a base of the same numbers, in one process or more;
one that cannot be is refused before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.backends.torch_engine.lora.test_begun_in_slices import BEGUN
from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.adaptations.lora.configs import MULTIPLYING
from training_hub.backends.torch_engine.fused import swap
from training_hub.backends.torch_engine.fused.exchange import OnKernels
from training_hub.backends.torch_engine.loading.dividing import attach, filled, load_blank
from training_hub.backends.torch_engine.loading.model import LoadedModel, load_model
from training_hub.backends.torch_engine.loading.quantization import dequantise, low_layers
from training_hub.backends.torch_engine.optim import Masters
from training_hub.errors import RecipeError
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe

pytest.importorskip("peft")
CPU = torch.device("cpu")

REFUSED_HERE = ("pissa", "olora", "pissa_niter_4", "whole modules", "a part of the weights of tables, too")
CASES = {
    **{name: lora for name, lora in BEGUN.items() if name not in REFUSED_HERE},
    "a whole head": {"modules_to_save": ["lm_head"]},
}
QUICK = ("dora", "psoft", "unilora", "orthogonal", "a whole head")
PACKAGES = {"int4": "bitsandbytes", "int8": "torchao"}
BOTH = [
    pytest.param(case, kind, marks=[] if case in QUICK else [pytest.mark.slow])
    for kind in PACKAGES
    for case in CASES
    if case not in MULTIPLYING[kind]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 48 numbers are three quarters of a block of NF4."""
    path = tmp_path_factory.mktemp("low") / "model"
    tiny_model("llama", num_hidden_layers=1, hidden_size=48, intermediate_size=80).save_pretrained(path)
    return path


def asked_for(folder: Path, kind: str, lora: dict[str, Any]) -> Recipe:
    pytest.importorskip(PACKAGES[kind])
    sections = {"lora": lora, "model": {"quantization": kind}}
    return recipe(folder, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", **sections)


def whole(asked: Recipe) -> nn.Module:
    return Lora(asked).attach(load_model(asked, CPU, torch.float32).model)


def beside_dense(asked: Recipe) -> nn.Module:
    model = load_model(asked, CPU, torch.float32).model
    dequantise(model)
    return Lora(asked).attach(model)


def in_slices(asked: Recipe) -> nn.Module:
    blank = load_blank(asked, CPU, torch.float32)
    assert isinstance(blank, LoadedModel) and Lora(asked).begins_beside() == ""
    begun = attach(blank, Lora(asked), CPU)
    return filled(begun, 1, CPU, open_console("off"), is_offloaded=False)[0].model


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of what trains, and what the model says."""
    torch.manual_seed(0)
    said = model.train()(input_ids=torch.arange(8)[None]).logits
    said.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"logits": said.detach()}


@pytest.mark.parametrize("make", [whole, in_slices])
@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_it_learns_what_it_does_beside_the_same_numbers(
    case: str, kind: str, make: Callable[[Recipe], nn.Module], folder: Path
) -> None:
    """Sums in another order move gradients in the sixth digit."""
    asked = asked_for(folder, kind, CASES[case])
    found, wanted = learned(make(asked)), learned(beside_dense(asked))
    assert found.keys() == wanted.keys() and len(found) > 1
    for name, one in wanted.items():
        assert (found[name] - one).norm() <= 1e-5 * one.norm(), name


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_it_begins_alike_in_slices_in_16_bits(case: str, kind: str, folder: Path) -> None:
    asked = asked_for(folder, kind, CASES[case])
    model = load_model(asked, CPU, torch.bfloat16).model
    Lora(asked).attach(model)
    blank = load_blank(asked, CPU, torch.bfloat16)
    assert isinstance(blank, LoadedModel)
    begun = attach(blank, Lora(asked), CPU).model
    wanted, found = dict(model.named_parameters()), dict(begun.named_parameters())
    assert [(name, one.shape, one.dtype) for name, one in found.items()] == [
        (name, one.shape, one.dtype) for name, one in wanted.items()
    ]
    made = {name: one for name, one in found.items() if not one.is_meta} | dict(begun.named_buffers())
    wanted |= dict(model.named_buffers())
    assert made and [name for name, one in made.items() if not torch.equal(one, wanted[name])] == []


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_head_begins_from_the_numbers_of_its_file(kind: str, folder: Path) -> None:
    asked = asked_for(folder, kind, {"modules_to_save": ["lm_head"]})
    loaded = load_model(asked, CPU, torch.bfloat16)
    masters = Masters(Lora(asked).attach(loaded.model).named_parameters(), base=loaded.base)
    name = next(name for name in masters.weights if "lm_head" in name)
    assert torch.equal(masters.weights[name], load_file(folder / "model.safetensors")["lm_head.weight"])
    assert masters.rounded == []


@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"tuner": "hra"}, r"lora\.tuner: hra computes with the weights themselves, of which int. keeps bytes\. Write"),
        ({"tuner": "glora"}, r"lora\.tuner: glora computes with the weights"),
        ({"options": {"init_lora_weights": "pissa_niter_4"}}, "pissa_niter_4 takes its start out of the weights"),
        ({"modules_to_save": ["o_proj"]}, r"modules_to_save: 'o_proj' is model\.layers\.0\.self_attn\.o_proj, whose"),
        ({"modules_to_save": ["mlp"]}, r"modules_to_save: 'mlp' is model\.layers\.0\.mlp, whose weights int. keeps in"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, lora: dict[str, Any], words: str, folder: Path) -> None:
    blank = tiny_model("llama", num_hidden_layers=1).to("meta")
    with pytest.raises(RecipeError, match=words):
        Lora(asked_for(folder, kind, lora)).attach(blank)


@pytest.mark.parametrize("kind", PACKAGES)
def test_it_multiplies_by_its_numbers_where_the_kernels_are_left(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "relative_difference", lambda found, wanted: 1.0)
    asked = asked_for(folder, kind, {})
    loaded = load_model(asked, CPU, torch.float32)
    assert "without kernels of our own" in " ".join(loaded.notes)
    assert low_layers(loaded.model) and all(isinstance(layer, OnKernels) for layer in low_layers(loaded.model))
    found = learned(Lora(asked).attach(loaded.model))
    assert torch.isfinite(found["logits"]).all()
