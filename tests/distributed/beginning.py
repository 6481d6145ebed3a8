"""How a process comes by what OSFT trains, of a model that is divided and that it never holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from tests.distributed.measuring import CPU, memory_profiled, rise
from training_hub.backends import Given
from training_hub.backends.torch_engine.adaptations.osft import Osft
from training_hub.backends.torch_engine.adaptations.osft.importance import layer_importance
from training_hub.backends.torch_engine.assembly import assemble
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of
from training_hub.backends.torch_engine.loading.dividing import load_for
from training_hub.backends.torch_engine.loading.model import choose_dtype, load_model
from training_hub.backends.torch_engine.materials import Materials, load_materials
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.base_weights import BaseWeights, OpenBase
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe


@dataclass(frozen=True)
class Counted(BaseWeights):
    """Weights as they came, of which it is counted how many numbers are read, each time that they are opened."""

    counts: list[int] = field(default_factory=list)

    @contextmanager
    def opened(self) -> Iterator[OpenBase]:
        with opened(self.files) as files:
            yield OpenBase(self.named(files), self.held)
            self.counts.append(files.numbers_read)


def begun(group: Group, recipe: dict[str, Any]) -> dict[str, Any]:
    """Which tensors of this process are not those that a process by itself begins with, and what it took to make them:
    numbers that were read beside its slices, and how far the bytes of all tensors rose.

    decomposed: numbers of all targets. own: bytes of what it keeps, the model's slices among it; alone: of the targets
    and all that is kept for them by a process by itself."""
    asked, console = Recipe.model_validate(recipe), open_console("off")
    materials, folder = load_materials(asked, Given(), console), Path(asked.model.path)
    layout, dtype = layout_of(asked.parallelism, group, CPU), choose_dtype(asked.model.dtype, CPU)
    with memory_profiled() as profiled:
        loaded = load_for(layout, asked, CPU, dtype, None, [], console)
        base = Counted(**{one.name: getattr(loaded.base, one.name) for one in fields(loaded.base)})
        run = assemble(asked, replace(loaded, base=base), materials, CPU, dtype, console, layout=layout)
    made = {**run.adaptation.weights(), **run.adaptation.saved()}
    own = {name: local_of(one) for name, one in {**made, **dict(run.model.named_parameters())}.items()}
    wanted = _begun_alone(asked, materials, dtype)
    unlike = [
        name for name, one in made.items()
        if name not in wanted or not torch.equal(local_of(one), wanted[name][cut_of(one).slices].to(one.dtype))
    ]  # fmt: skip
    return {
        "is_blank": bool(loaded.files),
        "made": len(made),
        "unlike": unlike,
        "decomposed": sum(math.prod(base.shapes[name]) for name in run.adaptation.claimed),
        "read": sum(base.counts),
        "own": sum(one.numel() * one.element_size() for one in own.values()),
        "alone": sum(one.numel() * one.element_size() for one in wanted.values()),
        "rise": rise(profiled, {file.stat().st_size for file in folder.glob("*.safetensors")}),
    }


def _begun_alone(asked: Recipe, materials: Materials, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a process by itself begins with, from a model that it has read whole."""
    console, whole, adaptation = open_console("off"), load_model(asked, CPU, dtype), Osft(asked)
    adaptation.attach(whole.model)
    if materials.watch is not None:
        adaptation.weigh(layer_importance(whole.model, materials.watch, CPU, console))
    adaptation.begin_as_it_came(whole.base)
    adaptation.begin(console)
    return {**adaptation.weights(), **adaptation.saved()}
