"""A file of weights as transformers names and lays out what it holds, written as the weights come, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training_hub.backends.torch_engine.saving.growing_file import METADATA, NAMES, About, GrowingFile

Parts = Mapping[str, Mapping[str, About] | None]
"""By tensor of the model what a file holds of it, by the file's names; None where that is known once all have come."""


class FinalFile:
    """The file at `path`, which is to hold these parts of the model's tensors; where these are None, all are held until
    the last has come.

    held: bytes of what has come and is not written.
    """

    def __init__(self, model: Any, path: Path, parts: Parts):
        self.path, self.held = path, 0
        self._model, self._parts, self._waiting = model, parts, dict[str, Tensor]()
        about = {key: one for part in parts.values() if part is not None for key, one in part.items()}
        self._file = GrowingFile(path, about) if about else None

    def put(self, name: str, tensor: Tensor) -> int:
        """Write what the file holds of a tensor of the model; how many bytes that is."""
        wanted = self._parts[name]
        if self._file is None or wanted is None:
            self._waiting[name] = tensor.cpu()
            self.held += bytes_of(tensor)
            return bytes_of(tensor)
        size = 0
        for key, part in reverted(self._model, {name: tensor}).items():
            if key in wanted:
                self._file.put(key, part)
                size += bytes_of(part)
        return size

    def finish(self) -> list[str]:
        """All have come; names of those that the file holds otherwise."""
        if self._file is not None:
            return self._file.wrong()
        whole = {name: tensor.contiguous() for name, tensor in reverted(self._model, self._waiting).items()}
        save_file(whole, self.path, METADATA)
        self._waiting.clear()
        self.held = 0
        return []


def bytes_of(tensor: Tensor) -> int:
    """How much memory its numbers take."""
    return tensor.numel() * tensor.element_size()


def parts_of(model: Any, tensors: Mapping[str, About]) -> Parts:
    """What files hold of each tensor, all of them in the order of files; None of each, where files have one tensor for
    several of the model's, or a number format that is none of NAMES."""
    each = {name: _about(model, {name: one}) for name, one in tensors.items()}
    found = {key: one for part in each.values() for key, one in part.items()}
    is_known = all(dtype in NAMES for _, dtype in found.values())
    return each if is_known and found == _about(model, tensors) else dict.fromkeys(tensors)


def _about(model: Any, tensors: Mapping[str, About]) -> dict[str, About]:
    blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    return {name: (tuple(one.shape), one.dtype) for name, one in reverted(model, blank).items()}


def reverted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as files of this kind of model have them."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found
