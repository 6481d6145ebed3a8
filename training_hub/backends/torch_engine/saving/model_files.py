"""The shape of what writes a final model and reads it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class ModelFiles(Protocol):
    """How what was trained becomes files of a folder, and how it is read again. dtype: their format, where not that in
    which the model came."""

    @property
    def dtype(self) -> torch.dtype | None: ...

    def save(self, model: Any, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None: ...

    def load(self, model: Any, dtype: torch.dtype, folder: Path) -> tuple[Any, dict[str, Tensor], list[str]]:
        """The model that `folder` makes, its tensors under the names they were saved by, and what went wrong."""
        ...
