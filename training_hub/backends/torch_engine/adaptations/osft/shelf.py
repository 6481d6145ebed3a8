"""Decompositions kept on disk, one sealed folder for each, found again by the hash of their weight."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.folders import damage, remove, tidy, write_whole

FILE = "split.safetensors"
VERSION = 3
"""Goes up whenever `decompose.split` gives something else for the same weight."""


@dataclass(frozen=True)
class Shelf:
    """A folder of kept splits, and how many bytes they may take."""

    root: Path
    most_bytes: float

    def get(self, weight: Tensor, cut: str, make: Callable[[], Split], say: Callable[[str], None]) -> Split:
        """The split of `weight` that `make` gives, from the shelf where it lies there whole.

        cut: what beside the weight decides it: how many directions are kept. A shelf that cannot be written to is said,
        and only costs time.
        """
        key = _key(weight, cut)
        folder = self.root / key[:2] / key
        if folder.is_dir() and not damage(folder):
            os.utime(folder)
            found = load_file(folder / FILE, device=str(weight.device))
            return Split(**{field.name: found[field.name] for field in fields(Split)})
        split = make()
        try:
            with write_whole(folder, {"version": VERSION}, replace=True) as aside:
                save_file({name: tensor.contiguous() for name, tensor in split.tensors().items()}, aside / FILE)
            self._prune(folder)
        except (OSError, SafetensorError) as error:
            say(f"osft: a decomposition is not kept in {folder}: {error}")
        return split

    def _prune(self, newest: Path) -> None:
        """Remove splits until the rest fits, those not used for longest first, never the newest."""
        tidy(newest.parent)
        folders = sorted(self.root.glob("[0-9a-f][0-9a-f]/*"), key=lambda folder: folder.stat().st_mtime)
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}
        left = sum(sizes.values())
        for folder in folders:
            if left <= self.most_bytes or folder == newest:
                return
            remove(folder)
            left -= sizes[folder]


def _key(weight: Tensor, cut: str) -> str:
    digest = hashlib.sha256(f"{VERSION} {weight.dtype} {tuple(weight.shape)} {cut}".encode())
    digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
