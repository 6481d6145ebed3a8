"""What lies beside the weights of a divided model, in safetensors files: brought to process 0, which writes it, one
tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.growing_file import About, GrowingFile
from training_hub.errors import TrainingError

WHAT = "what lies beside the weights"


def write_beside_together(group: Group, files: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write `files` into `folder`, each with the bytes that the library writes of all its tensors at once.

    All processes must call it. files: by name, the tensors that this process has to give; of those that several have,
    the first one gives its own. Raises OSError, TrainingError in process 0 where they are not written.
    """
    said = {
        file: {name: [list(one.shape), str(one.dtype).removeprefix("torch.")] for name, one in tensors.items()}
        for file, tensors in files.items()
    }
    owners: dict[str, dict[str, int]] = {}
    about: dict[str, dict[str, About]] = {}
    for rank, told in enumerate(group.gather(said)):
        for file, tensors in told.items():
            for name, (shape, kind) in tensors.items():
                owners.setdefault(file, {}).setdefault(name, rank)
                about.setdefault(file, {})[name] = (tuple(shape), getattr(torch, kind))
    for file, named in owners.items():
        _write(group, files.get(file, {}), named, about[file], folder / file)


def _write(
    group: Group, own: Mapping[str, Tensor], owners: Mapping[str, int], about: Mapping[str, About], path: Path
) -> None:
    made: GrowingFile | None = None
    problems: list[OSError] = []
    for name in owners:
        tensor = _brought(group, own, owners[name], name, about[name])
        if tensor is None or problems:
            continue
        try:  # the others count on this process to go on
            made = made or GrowingFile(path, about, metadata=None)
            made.put(name, tensor)
        except OSError as error:
            problems.append(error)

    def check() -> None:
        if problems:
            raise problems[0]
        if made is not None and (wrong := made.wrong()):
            raise TrainingError([f"{path.name}: {name} is not what was written" for name in wrong])

    group.on_main(WHAT, check)


def _brought(group: Group, own: Mapping[str, Tensor], owner: int, name: str, about: About) -> Tensor | None:
    """The tensor, in process 0; None in the others."""
    if group.rank == owner:
        tensor = own[name].detach().cpu().contiguous()
        if owner == 0:
            return tensor
        if tensor.numel():
            with group.explained(WHAT):
                dist.send(tensor, 0)
        return None
    if not group.is_main:
        return None
    shape, dtype = about
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        with group.explained(WHAT):
            dist.recv(tensor, owner)
    return tensor
