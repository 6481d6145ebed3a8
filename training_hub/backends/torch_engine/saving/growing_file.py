"""A safetensors file that is written tensor by tensor, with the bytes that the library writes of all at once.

Source of the format: the README of github.com/huggingface/safetensors. Order and padding of tensors are those of
its version 0.8, to which a test holds them.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

About = tuple[tuple[int, ...], torch.dtype]
"""Shape and format of a tensor."""

NAMES: Mapping[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Number formats as a file names them, in the order in which it has them."""

METADATA = {"format": "pt"}
ALIGNED = 8


class GrowingFile:
    """The file at `path`, which is to hold the tensors that `about` tells of; all must be put there, in any order."""

    def __init__(self, path: Path, about: Mapping[str, About], metadata: Mapping[str, str] | None = METADATA):
        self.path = path
        header, self._starts, size = _header(about, metadata)
        self._sums: dict[str, int] = {}
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one of its tensors."""
        left = _bytes(tensor.detach().cpu())
        self._sums[name] = zlib.crc32(left)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._starts[name])
            while left:
                left = left[file.write(left) :]

    def wrong(self) -> list[str]:
        """Names of tensors that the library reads otherwise than they were put there, or that are missing."""
        with safe_open(self.path, framework="pt") as file:
            found = {name: zlib.crc32(_bytes(file.get_tensor(name))) for name in file.keys()}  # noqa: SIM118
        return [name for name in self._starts if name not in self._sums or found.get(name) != self._sums[name]]


def _bytes(tensor: Tensor) -> memoryview:
    """Its numbers as they lie in a file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(about: Mapping[str, About], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """What stands before the numbers, where those of each tensor begin, and how many bytes they have in all."""
    order = list(NAMES)
    content: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    starts, end = {}, 0
    for name in sorted(about, key=lambda one: (order.index(about[one][1]), one.encode())):
        shape, dtype = about[name]
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    first = len(text) + 8
    return len(text).to_bytes(8, "little") + text, {name: first + start for name, start in starts.items()}, end
