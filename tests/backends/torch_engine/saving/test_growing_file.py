"""A file that grows tensor by tensor is the file that safetensors writes of all of them, byte for byte."""

from __future__ import annotations

import random

import torch
from safetensors.torch import save_file

from training_hub.backends.torch_engine.saving.growing_file import METADATA, NAMES, GrowingFile

TENSORS = {
    **{f"kind.{number}": (torch.arange(7 * number).view(-1, 7) % 2).to(kind) for number, kind in enumerate(NAMES)},
    "a single number": torch.tensor(3.5),
    "nothing": torch.zeros(0, 4),
    "layers.10.w": torch.ones(3),
    "layers.9.w": torch.ones(2),
    'quoted " \\ and ä': torch.ones(1, dtype=torch.bfloat16),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def grown(path, names):
    file = GrowingFile(path, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()})
    for name in names:
        file.put(name, TENSORS[name])
    return file


def test_the_file_is_the_librarys_in_whatever_order_tensors_come(tmp_path):
    names = list(TENSORS)
    random.Random(0).shuffle(names)
    file = grown(tmp_path / "grown.safetensors", names)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "whole.safetensors", METADATA)
    assert (tmp_path / "grown.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert file.wrong() == []


def test_what_is_missing_or_came_out_otherwise_is_named(tmp_path):
    file = grown(tmp_path / "grown.safetensors", [name for name in TENSORS if name != "turned"])
    assert file.wrong() == ["turned"]
    file.put("turned", TENSORS["turned"])
    whole = bytearray(file.path.read_bytes())
    whole[-1] ^= 1
    file.path.write_bytes(whole)
    assert len(file.wrong()) == 1
