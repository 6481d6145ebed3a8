"""Quantised layers of a model without contents: made so, divided like any, and given their numbers matrix by matrix.

Scales of int4 are quantised once more with one mean for all of a matrix, so that no slice of it can be quantised by
itself. The processes among which a matrix lies take turns: each reads and quantises one, whole in it alone, and sends
the bytes; of these each keeps its slice. So the bits are those of a process by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_hub.backends.torch_engine.layouts.pieces import cut_of, groups_across, local_of, whole_cut
from training_hub.backends.torch_engine.loading.blank import plain_name
from training_hub.backends.torch_engine.loading.on_demand import OnDemand
from training_hub.backends.torch_engine.loading.packing import Packing, packed
from training_hub.backends.torch_engine.loading.quantization import (
    BLOCK,
    OWN,
    PACKED,
    SECOND,
    TURNED,
    frozen_layers,
    low_layers,
    multiply_dense,
    quantised,
    rounded,
    straighten,
)
from training_hub.backends.torch_engine.saving.base_weights import OpenBase
from training_hub.backends.torch_engine.saving.expert_files import ExpertFiles
from training_hub.backends.torch_engine.tensors import nonfinite_tensors

Matrix = tuple[str, nn.Linear]
"""A quantised layer, and the name of its weight in a model without adapters."""


def empty_layers(model: nn.Module, quantization: str) -> None:
    """Let the layers of a model without contents that are to be kept in fewer bits be such layers, in place: bytes on
    the meta device, which can be divided, and what makes numbers of them, there as well.
    """
    straighten(model, quantization)
    for layer in list(frozen_layers(model)):
        bytes_of, packing = empty_parts(layer, quantization, layer.weight.dtype)
        layer.weight = nn.Parameter(bytes_of, requires_grad=False)
        setattr(layer, PACKED, packing)
    multiply_dense(model)


def empty_parts(layer: nn.Linear, quantization: str, dtype: torch.dtype) -> tuple[Tensor, Packing]:
    """The bytes of the whole weight of a linear layer and their packing, without contents. dtype: of its numbers."""
    shape, meta = (layer.out_features, layer.in_features), torch.device("meta")
    if quantization == "int8":
        return packed(quantised(torch.empty(shape, dtype=dtype, device=meta), quantization).weight)
    # Not by the library as well: it would keep a table that it has made once on the meta device.
    blocks = math.ceil(math.prod(shape) / BLOCK)
    codes, scales = torch.uint8, torch.float32
    sizes = ((blocks, codes), (16, scales), (math.ceil(blocks / SECOND), scales), (256, scales))
    tensors = tuple(torch.empty(size, dtype=kind, device=meta) for size, kind in sizes)
    mean = torch.empty((), dtype=scales, device=meta)
    bytes_of = torch.empty(math.ceil(math.prod(shape) / 2), 1, dtype=codes, device=meta)
    return bytes_of, Packing(quantization, (*tensors, mean), (*shape, BLOCK, SECOND), dtype)


@contextmanager
def seen_dense(model: nn.Module) -> Iterator[None]:
    """Within, quantised layers look as if their weights had never been quantised; each is made dense when something is
    computed with it, and let go before the next. So an adapter is made beside it as beside any. Those that have no
    numbers are left alone."""
    layers = {f"{name}.weight": layer for name, layer in _low_layers(model).items() if not is_empty(layer)}
    if not layers:
        yield
        return
    bytes_of = {name: layer.weight for name, layer in layers.items()}
    packings: dict[str, Packing] = {name: getattr(layer, PACKED) for name, layer in layers.items()}
    for name, layer in layers.items():
        _look_dense(layer, bytes_of[name].device)
    try:
        with OnDemand(model, lambda name: packings[name].dense(bytes_of[name])):
            yield
    finally:
        for name, layer in layers.items():
            layer.weight = bytes_of[name]


def look_dense(model: nn.Module, device: torch.device) -> None:
    """Let quantised layers that have no numbers look as if they were not to be quantised, in place."""
    for layer in _empty_layers(model):
        _look_dense(layer, device)


def look_low(model: nn.Module) -> None:
    """Undo `look_dense`, in place: bytes on the meta device."""
    for layer in _empty_layers(model):
        layer.weight = nn.Parameter(_whole(layer)[0], requires_grad=False)


def reader(model: nn.Module, came: OpenBase, device: torch.device) -> Callable[[str], Tensor]:
    """What gives the whole weight of a name, as a model without contents will compute with it: of its quantised layers
    what is left of their numbers."""
    layers = {f"{name}.weight": layer for name, layer in _low_layers(model).items() if is_empty(layer)}

    def read(name: str) -> Tensor:
        if name not in layers:
            return came.whole(name)
        packing: Packing = getattr(layers[name], PACKED)
        whole = _straight(came.whole(name), layers[name]).to(device, packing.dtype)
        return rounded(whole, _quantization(packing))

    return read


def _straight(whole: Tensor, layer: nn.Linear) -> Tensor:
    """[N, M]: the layer's weight as it multiplies, of which the files hold `whole`."""
    return whole.T.contiguous() if hasattr(layer, TURNED) else whole


def _look_dense(layer: nn.Linear, device: torch.device) -> None:
    """One number that looks like all of them."""
    number = torch.zeros((), dtype=getattr(layer, PACKED).dtype, device=device)
    layer.weight = nn.Parameter(number.expand(layer.out_features, layer.in_features), requires_grad=False)


def _low_layers(model: nn.Module) -> dict[str, nn.Linear]:
    low = set(map(id, low_layers(model)))
    return {name: cast(nn.Linear, module) for name, module in model.named_modules() if id(module) in low}


def _empty_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in low_layers(model) if is_empty(layer)]


def is_empty(layer: nn.Module) -> bool:
    """Whether this is a quantised layer that has no numbers yet."""
    packing: Packing | None = getattr(layer, PACKED, None)
    return packing is not None and packing.tensors[0].is_meta


@torch.no_grad()
def fill_layers(
    model: nn.Module,
    files: ExpertFiles,
    device: torch.device,
    advance: Callable[[float], None] = lambda count: None,
) -> list[str]:
    """Give the quantised layers of a divided model what this process has of them; which are not finite in their files.

    All processes among which a layer lies must call it. Each holds a dense matrix at most, or then the bytes of two.
    advance: told of each layer that is there.
    """
    empty = {f"{name}.weight": layer for name, layer in _low_layers(model).items() if is_empty(layer)}
    matrices: list[Matrix] = [(plain_name(name), layer) for name, layer in empty.items()]
    broken: list[str] = []
    for group, some in _by_readers(matrices):
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        for turn in _in_turns(some, size):
            mine: list[Tensor] = []
            if rank < len(turn):
                name, layer = turn[rank]
                mine, found = _read(name, layer, files, device)
                broken += found
            for reader, (_, layer) in enumerate(turn):
                _keep(layer, _sent(mine if reader == rank else _like(layer, device), reader, group))
                if reader == rank:
                    mine = []
                advance(1)
    return broken


def _by_readers(matrices: list[Matrix]) -> list[tuple[dist.ProcessGroup | None, list[Matrix]]]:
    """The matrices by the group that takes turns in reading them; None where a process has them by itself."""
    found: dict[Any, list[Matrix]] = {}
    for name, layer in matrices:
        weight: Any = layer.weight
        groups = groups_across(weight if hasattr(weight, "placements") else None)
        found.setdefault(groups[0] if groups else None, []).append((name, layer))
    return list(found.items())


def _in_turns(matrices: list[Matrix], size: int) -> Iterator[list[Matrix]]:
    rest = iter(matrices)
    while some := list(islice(rest, size)):
        yield some


def _read(name: str, layer: nn.Linear, files: ExpertFiles, device: torch.device) -> tuple[list[Tensor], list[str]]:
    """The bytes of the whole weight and the tensors of its packing; and what is wrong with it."""
    packing: Packing = getattr(layer, PACKED)
    whole = _straight(files.read(name, whole_cut(files.shapes[name])), layer).to(device, packing.dtype)
    bytes_of, made = packed(quantised(whole, _quantization(packing)).weight)
    return [bytes_of, *made.tensors], nonfinite_tensors({name: whole})


def _like(layer: nn.Linear, device: torch.device) -> list[Tensor]:
    """Room for what `_read` gives in another process."""
    bytes_of, packing = _whole(layer)  # one that is split lacks some of it
    return [torch.empty_like(one, device=device) for one in (bytes_of, *packing.tensors)]


def _whole(layer: nn.Linear) -> tuple[Tensor, Packing]:
    packing: Packing = getattr(layer, PACKED)
    return empty_parts(layer, _quantization(packing), packing.dtype)


def _sent(parts: list[Tensor], reader: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    if group is not None:
        for one in parts:
            dist.broadcast(one.view(-1).view(torch.uint8), group=group, group_src=reader)
    return parts


def _keep(layer: nn.Linear, parts: list[Tensor]) -> None:
    """Let the layer have its own of the bytes and tensors of the whole weight."""
    bytes_of, packing = parts[0], replace(_whole(layer)[1], tensors=tuple(parts[1:]))
    if hasattr(layer, OWN):
        bytes_of, packing = getattr(layer, OWN)(bytes_of, packing)
    local_of(layer.weight.detach()).copy_(bytes_of[cut_of(layer.weight).slices])
    setattr(layer, PACKED, packing)


def _quantization(packing: Packing) -> str:
    return "int8" if packing.form == "int8" else "int4"
