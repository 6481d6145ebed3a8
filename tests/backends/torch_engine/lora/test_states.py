"""Compact optimizer states and activation checkpointing beside adapters; the plan of memory against what is kept."""

from __future__ import annotations

import pytest
import torch

from tests.backends.torch_engine.lora.test_quantization import wide_model_folder as wide_model_folder
from tests.backends.torch_engine.lora.test_runs import asked, train
from tests.backends.torch_engine.tiny_models import random_pack
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.loading.model_config import read_blank_model
from training_hub.backends.torch_engine.loading.quantization import PACKED, low_layers
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.planning.memory import estimate
from training_hub.backends.torch_engine.tensors import to_device

pytest.importorskip("peft")


def test_split_masters_take_the_same_steps(tiny_model_folder, chat_file, tmp_path):
    low = {"model": {"dtype": "bfloat16"}}
    whole = train(tiny_model_folder, chat_file, tmp_path / "full", **low)
    other = train(tiny_model_folder, chat_file, tmp_path / "split", optimizer={"lr": 3e-3, "state": "split"}, **low)
    for mine, theirs in zip(other.history, whole.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_checkpointed_activations_change_no_number(tiny_model_folder, chat_file, tmp_path):
    whole = train(tiny_model_folder, chat_file, tmp_path / "none")
    for how in ("selective", "full"):
        other = train(tiny_model_folder, chat_file, tmp_path / how, training={"activation_checkpointing": how})
        assert [row["loss"] for row in other.history] == [row["loss"] for row in whole.history]


@pytest.mark.parametrize("quantization", ["none", "int4", "int8"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"tuner": "pissa", "r": 4, "alpha": 4},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_the_plan_counts_what_there_is(quantization, lora, wide_model_folder, tmp_path):
    if quantization != "none" and "tuner" in lora:
        pytest.skip("pissa takes its start out of the weights")
    wanted = recipe(
        wide_model_folder, tmp_path / "none.jsonl", tmp_path / "run",
        **asked(lora=lora, model={"quantization": quantization}),
    )  # fmt: skip
    device, adaptation = torch.device("cpu"), ADAPTATIONS["lora"](wanted)
    model = adaptation.attach(load_model(wanted, device, torch.float32).model)
    pack = random_pack((40, 30, 50))
    planned = estimate(
        model, wanted.optimizer, torch.float32, device, pack, accumulates=False, holdings=adaptation.holdings()
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned["gradients"] * 2**30 == 4 * trained
    assert planned["optimizer"] * 2**30 == 8 * trained
    start = 4 * trained if "tuner" in lora else 0
    assert planned["weights"] * 2**30 == pytest.approx(bytes_of(model) + start, rel=0.1)
    assert planned["activations"] * 2**30 == pytest.approx(kept_bytes(model, pack), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_without_weights_counts_those_in_4_bits(dtype, wide_model_folder, tmp_path):
    """The folder is in float32, whatever the run computes in."""
    chosen = {"quantization": "int4", "dtype": dtype}
    wanted = recipe(wide_model_folder, tmp_path / "none.jsonl", tmp_path / "run", **asked(model=chosen))
    device, kind = torch.device("cpu"), getattr(torch, dtype)
    ahead, there = (ADAPTATIONS["lora"](wanted) for _ in range(2))
    blank = ahead.attach(read_blank_model(wanted.model)[0])
    model = there.attach(load_model(wanted, device, kind).model)
    planned = estimate(blank, wanted.optimizer, kind, device, random_pack((40, 30)), holdings=ahead.holdings())
    assert planned["weights"] * 2**30 == pytest.approx(bytes_of(model), rel=0.1)


def bytes_of(model: torch.nn.Module) -> int:
    """What the weights take, scales of quantised ones included."""
    packings = [getattr(layer, PACKED) for layer in low_layers(model)]
    scales = [one for packing in packings for one in packing.tensors if one.shape != (256,)]  # the table of 8-bit codes
    return sum(one.nbytes for one in (*model.parameters(), *scales))


def kept_bytes(model: torch.nn.Module, pack) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CrossEntropy()(model, to_device(pack, "cpu"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
