"""What a process has of a quantised model that it has read with others, and what it held on the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.measuring import memory_profiled, rise
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of
from training_hub.backends.torch_engine.loading.blank import plain_name
from training_hub.backends.torch_engine.loading.dividing import attach, filled, load_for
from training_hub.backends.torch_engine.loading.model import choose_dtype, load_model
from training_hub.backends.torch_engine.loading.packing import Packing
from training_hub.backends.torch_engine.loading.quantization import OWN, PACKED, dense
from training_hub.backends.torch_engine.parallel import Group
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe

CPU = torch.device("cpu")


def read_in_turns(group: Group, recipe: dict[str, Any]) -> dict[str, Any]:
    """Which quantised layers and other weights here are not those of a process that reads all of the model (`unlike`),
    how many layers there are, and what was not finite; bytes of what is kept here (`own`), of all bytes and scales of
    the whole model (`low`), of its largest matrix (`largest`), and how far those of all tensors rose (`rise`)."""
    asked, console = Recipe.model_validate(recipe), open_console("off")
    layout, dtype = layout_of(asked.parallelism, group, CPU), choose_dtype(asked.model.dtype, CPU)
    loaded = load_for(layout, asked, CPU, dtype, None, [], console)
    assert loaded.files, "it is read whole"
    loaded = attach(loaded, Lora(asked), CPU, group)
    model = loaded.model
    numbers = sum(map(math.prod, loaded.base.shapes.values()))
    with memory_profiled() as profiled:
        layout.divide(model, dtype)
        loaded, broken = filled(loaded, numbers, CPU, console, is_offloaded=False)
    whole = load_model(asked, CPU, dtype).model
    layers = _layers(model)
    alone = _layers(whole)
    unlike = [name for name in layers if not _same(layers[name], alone[name])]
    wanted = dict(whole.named_parameters())
    split = {f"{name}.weight" for name, layer in layers.items() if hasattr(layer, OWN)}
    for name, one in model.named_parameters():
        plain = plain_name(name)
        if plain in wanted.keys() - split and not torch.equal(
            local_of(one.detach()), wanted[plain].detach()[cut_of(one).slices]
        ):
            unlike.append(plain)
    files = {file.stat().st_size for file in Path(asked.model.path).glob("*.safetensors")}
    return {
        "unlike": unlike,
        "layers": len(layers),
        "broken": broken,
        "read": loaded.notes[-1],
        "own": _held([local_of(one) for one in model.parameters()], layers),
        "low": _held([layer.weight for layer in alone.values()], alone),
        "largest": max(layer.in_features * layer.out_features for layer in alone.values()) * dtype.itemsize,
        "rise": rise(profiled, files),
    }


def _layers(model: nn.Module) -> dict[str, Any]:
    return {plain_name(name): module for name, module in model.named_modules() if hasattr(module, PACKED)}


def _same(mine: Any, theirs: Any) -> bool:
    if hasattr(mine, OWN):
        mesh, cut = mine.weight.device_mesh, mine.weight.placements[0].dim
        part_of = dense(theirs, torch.float32).chunk(mesh.size(), cut)[mesh.get_local_rank()]
        return torch.equal(dense(mine, torch.float32), part_of)
    own, other = (getattr(layer, PACKED) for layer in (mine, theirs))
    same = (own.form, own.sizes, own.dtype) == (other.form, other.sizes, other.dtype)
    return same and all(map(torch.equal, own.tensors, other.tensors))


def _held(tensors: list[Tensor], layers: dict[str, Any]) -> int:
    packings: list[Packing] = [getattr(layer, PACKED) for layer in layers.values()]
    tensors = [*tensors, *(tensor for packing in packings for tensor in packing.tensors)]
    return sum(one.numel() * one.element_size() for one in tensors)
