"""Experts that lie in files matrix by matrix, read as the stacked tensors that a model has."""

# E experts, F width of an expert, D width of the model

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training_hub.backends.torch_engine.layouts.pieces import Cut

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.saving.tensor_files import TensorFiles

STACKED = re.compile(r"(?P<owner>.*)\.experts\.(?P<leaf>gate_up_proj|down_proj)$")

PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""What a stacked tensor [E, rows, D or F] holds of each expert, one below the other: as Qwen's files name it, and as
Mixtral's do. Source: the checkpoints of both."""

OWNERS = ((".mlp", ".block_sparse_moe"),)
"""A block of experts in the model, and in files of Mixtral's kind."""


class ExpertFiles:
    """The tensors of some files under the names that the model has for them. renamed: by these, what the files call
    otherwise: GPT-2 as its makers saved it has no `transformer.`."""

    def __init__(
        self,
        files: TensorFiles,
        wanted: Mapping[str, tuple[int, ...]],
        renamed: Mapping[str, str] = MappingProxyType({}),
    ):
        self._files = files
        self._plain: dict[str, str] = {}
        self._stacked: dict[str, list[list[str]]] = {}
        for name, shape in wanted.items():
            if name in files.shapes:
                self._plain[name] = name
            elif parts := self._parts(name, shape):
                self._stacked[name] = parts
            elif name in renamed:
                self._plain[name] = renamed[name]
            elif other := next((one for one in _otherwise(name) if one in files.shapes), None):
                self._plain[name] = other
        used = {*self._plain.values(), *(part for parts in self._stacked.values() for own in parts for part in own)}
        stacked = {name: self._shape(parts) for name, parts in self._stacked.items()}
        self.shapes = {
            **{name: files.shapes[key] for name, key in self._plain.items()},
            **stacked,
            **{name: shape for name, shape in files.shapes.items() if name not in used},
        }

    def read(self, name: str, cut: Cut) -> Tensor:
        """The part of the tensor that `cut` says, on the CPU; of experts only those that it has."""
        if name not in self._stacked:
            return self._files.read(self._plain.get(name, name), cut)
        if cut.is_empty:
            return torch.empty(cut.sizes)
        chosen = self._stacked[name][cut.slices[0]]
        return torch.stack([torch.cat([self._files.read(part) for part in own])[cut.slices[1:]] for own in chosen])

    def dtype(self, name: str) -> torch.dtype | None:
        """The number format of the tensor, of experts that of the first; None where it is none of torch's floats."""
        first = self._stacked[name][0][0] if name in self._stacked else self._plain.get(name, name)
        return self._files.dtype(first)

    def _parts(self, name: str, shape: tuple[int, ...]) -> list[list[str]]:
        """For each expert the names of its matrices; [] where the files do not hold them so."""
        found = STACKED.match(name)
        if found is None:
            return []
        for owner in (found["owner"], *_otherwise(found["owner"])):
            for leaves in PARTS[found["leaf"]]:
                names = [[f"{owner}.experts.{number}.{leaf}.weight" for leaf in leaves] for number in range(shape[0])]
                if all(part in self._files.shapes for own in names for part in own):
                    return names
        return []

    def _shape(self, parts: list[list[str]]) -> tuple[int, ...]:
        shapes = [self._files.shapes[part] for part in parts[0]]
        return len(parts), sum(shape[0] for shape in shapes), *shapes[0][1:]


def _otherwise(name: str) -> list[str]:
    """How files of other kinds would call what the model calls `name`."""
    return [name.replace(ours, theirs) for ours, theirs in OWNERS if ours in name]
