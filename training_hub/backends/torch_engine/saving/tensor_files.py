"""Tensors in safetensors files, whole or in pieces that several processes wrote; any piece of them can be read.

A file of pieces says in its own header where each lies in its whole, so that it needs no index beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training_hub.backends.shared.model_folder import STORED_AS
from training_hub.backends.torch_engine.layouts.pieces import Cut, whole_cut
from training_hub.errors import CheckpointError

FLOATS = {name: getattr(torch, known) for name, known in STORED_AS.items()}
"""Number formats as a safetensors file names them."""

CUTS = "cuts"
"""Key of a file's metadata: JSON, by tensor the shape of the whole and where the piece starts in it."""


@dataclass(frozen=True)
class Pieces:
    """Pieces of tensors by name, and where each lies in its whole."""

    tensors: Mapping[str, Tensor]
    cuts: Mapping[str, Cut]


def write_whole_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors from wherever they lie."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)


def write_pieces(path: Path, pieces: Pieces) -> None:
    """Write pieces, and in the header where they lie."""
    places = {name: [pieces.cuts[name].shape, pieces.cuts[name].starts] for name in pieces.tensors}
    write_whole_tensors(path, pieces.tensors, {CUTS: json.dumps(places)})


def files_of(folder: Path, name: str) -> list[Path]:
    """The files of `folder` that hold the tensors called `name` ("model", "optimizer"), whole or in pieces."""
    whole = folder / f"{name}.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{name}-rank*.safetensors"))


def piece_file(name: str, rank: int) -> str:
    """The file in which process `rank` writes its pieces."""
    return f"{name}-rank{rank}.safetensors"


@dataclass(frozen=True)
class _Held:
    """A piece in an open file."""

    file: Any
    cut: Cut


class TensorFiles:
    """The tensors of some open files, by name. numbers_read: how many numbers were asked for so far."""

    def __init__(self, files: Iterable[Any]):
        self.numbers_read = 0
        self._held: dict[str, list[_Held]] = {}
        for file in files:
            metadata = file.metadata() or {}
            noted = json.loads(metadata[CUTS]) if CUTS in metadata else {}
            for name in file.keys():  # noqa: SIM118
                sizes = tuple(file.get_slice(name).get_shape())
                shape, starts = noted.get(name, (sizes, (0,) * len(sizes)))
                self._held.setdefault(name, []).append(_Held(file, Cut(tuple(shape), tuple(starts), sizes)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole tensor."""
        return {name: held[0].cut.shape for name, held in self._held.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        """The number format of the tensor; None where it is none of FLOATS, or there is no such tensor."""
        held = self._held.get(name)
        return FLOATS.get(held[0].file.get_slice(name).get_dtype()) if held else None

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """The tensor, or the part of it that `cut` says, on the CPU. Raises CheckpointError where a part is missing."""
        wanted = cut or whole_cut(self._held[name][0].cut.shape)
        if wanted.is_empty:
            return torch.empty(wanted.sizes)
        for one in self._held[name]:
            if one.cut == wanted:
                self.numbers_read += math.prod(wanted.sizes)
                found: Tensor = one.file.get_tensor(name)
                return found
        return self._put_together(name, wanted)

    def _put_together(self, name: str, wanted: Cut) -> Tensor:
        result: Tensor | None = None
        count = 0
        for one in self._held[name]:
            here, there = _overlap(wanted, one.cut)
            if any(part.start >= part.stop for part in here):
                continue
            part = one.file.get_slice(name)[there]
            self.numbers_read += part.numel()
            if result is None:
                result = torch.empty(wanted.sizes, dtype=part.dtype)
            result[here] = part
            count += part.numel()
        if result is None or count < result.numel():
            raise CheckpointError(f"{name}: {math.prod(wanted.sizes) - count:,} of its numbers are in no file.")
        return result


def _overlap(wanted: Cut, held: Cut) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What two pieces of one tensor share: where it lies in the first and where in the second."""
    here, there = [], []
    for start, size, other, length in zip(wanted.starts, wanted.sizes, held.starts, held.sizes, strict=True):
        first, last = max(start, other), min(start + size, other + length)
        here.append(slice(first - start, last - start))
        there.append(slice(first - other, last - other))
    return tuple(here), tuple(there)


@contextmanager
def opened(paths: Iterable[Path]) -> Iterator[TensorFiles]:
    """The tensors of these files, which are read when they are asked for."""
    with ExitStack() as stack:
        yield TensorFiles([stack.enter_context(safe_open(path, framework="pt")) for path in paths])
