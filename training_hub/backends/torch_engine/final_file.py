"""A file of weights as transformers names and lays out what it holds, written as the weights come, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training_hub.backends.torch_engine.growing_file import METADATA, NAMES, About, GrowingFile


class FinalFile:
    """The file at `path`, which is to hold these tensors of the model. Where files have one tensor for several of the
    model's, or a number format that is none of NAMES, all are held until the last has come.

    held: bytes of what has come and is not written.
    """

    def __init__(self, model: Any, path: Path, tensors: Mapping[str, About]):
        self.path, self.held = path, 0
        self._model, self._waiting = model, dict[str, Tensor]()
        about = _contents(model, tensors)
        self._file = GrowingFile(path, about) if about is not None else None

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the model."""
        if self._file is None:
            self._waiting[name] = tensor.cpu()
            self.held += bytes_of(tensor)
            return
        for key, part in _reverted(self._model, {name: tensor}).items():
            self._file.put(key, part)

    def finish(self) -> list[str]:
        """All have come; names of those that the file holds otherwise."""
        if self._file is not None:
            return self._file.wrong()
        whole = {name: tensor.contiguous() for name, tensor in _reverted(self._model, self._waiting).items()}
        save_file(whole, self.path, METADATA)
        self._waiting.clear()
        self.held = 0
        return []


def bytes_of(tensor: Tensor) -> int:
    """How much memory its numbers take."""
    return tensor.numel() * tensor.element_size()


def _contents(model: Any, tensors: Mapping[str, About]) -> dict[str, About] | None:
    """What a file of these tensors holds; None where that must be known all at once."""
    each = [_about(model, {name: one}) for name, one in tensors.items()]
    found = {key: one for part in each for key, one in part.items()}
    is_known = all(dtype in NAMES for _, dtype in found.values())
    return found if is_known and found == _about(model, tensors) else None


def _about(model: Any, tensors: Mapping[str, About]) -> dict[str, About]:
    blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    return {name: (tuple(one.shape), one.dtype) for name, one in _reverted(model, blank).items()}


def _reverted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as files of this kind of model have them."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found
