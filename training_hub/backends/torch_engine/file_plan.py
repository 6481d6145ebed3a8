"""The files of a final model, planned by all processes: what each file holds, who has that, and who writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training_hub.backends.torch_engine.growing_file import About

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.loop import Run

PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Kept:
    """A tensor of the whole model. dtype: the format of its exact numbers. place: the processes that have it, by the
    number that they have in their pipelines; all processes are 0 where there are none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: int


@dataclass(frozen=True)
class FilePlan:
    """tensors: all of the model, in the order of files. formats: those they get, unless nothing has moved them. files:
    names of the tensors in each. writers: the process that
    writes each file. places: those of all processes. speakers: of each place the process that speaks for it."""

    tensors: Mapping[str, Kept]
    formats: Mapping[str, torch.dtype]
    files: Mapping[str, Sequence[str]]
    writers: Mapping[str, int]
    places: Sequence[int]
    speakers: Mapping[int, int]

    def sender(self, name: str, file: str) -> int:
        """The process that has the whole tensor to write it, or to send it to who does."""
        place, writer = self.tensors[name].place, self.writers[file]
        return writer if self.places[writer] == place else self.speakers[place]


def planned(run: Run, own: Mapping[str, About], dtype: torch.dtype, size: str) -> FilePlan:
    """The plan of all processes, which must all call it.

    own: shape and format of the tensors that this one has pieces of. dtype: the format that is written. size: the most
    that a file holds, as transformers reads it.
    """
    from transformers.core_model_loading import dot_natural_key

    layout = run.layout
    place = layout.pipeline.route.place if layout.pipeline is not None else 0
    mine = {name: [list(shape), _name_of(kind)] for name, (shape, kind) in own.items()} if layout.is_first else {}
    told = run.group.gather([place, mine])
    places = [each[0] for each in told]
    found: dict[str, Kept] = {}
    for number, named in sorted(told, key=lambda each: each[0]):
        for name, (shape, kind) in named.items():
            found.setdefault(name, Kept(tuple(shape), getattr(torch, kind), number))
    # The order in which transformers writes a model that it has read.
    tensors = {name: found[name] for name in sorted(found, key=dot_natural_key)}
    formats = {name: dtype if one.dtype.is_floating_point else one.dtype for name, one in tensors.items()}
    files = _parted(tensors, formats, size)
    return FilePlan(tensors, formats, files, _writers(tensors, files, places), places, _firsts(told))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parted(tensors: Mapping[str, Kept], formats: Mapping[str, torch.dtype], size: str) -> dict[str, list[str]]:
    """The files, and what each holds: parted as transformers parts them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {name: torch.empty(one.shape, dtype=formats[name], device="meta") for name, one in tensors.items()}
    found = split_torch_state_dict_into_shards(shapes, filename_pattern=PATTERN, max_shard_size=size)
    return {file: list(names) for file, names in found.filename_to_tensors.items()}


def _writers(tensors: Mapping[str, Kept], files: Mapping[str, Sequence[str]], places: Sequence[int]) -> dict[str, int]:
    """Each file is written by a process that has the most of it, by these in turn; the first one by process 0."""
    turns: Counter[int] = Counter()
    found: dict[str, int] = {}
    for file, names in files.items():
        numbers: Counter[int] = Counter()
        for name in names:
            numbers[tensors[name].place] += torch.Size(tensors[name].shape).numel()
        place = numbers.most_common(1)[0][0] if found else places[0]
        ranks = [rank for rank, one in enumerate(places) if one == place]
        found[file] = ranks[turns[place] % len(ranks)]
        turns[place] += 1
    return found


def _firsts(told: Sequence[Any]) -> dict[int, int]:
    """Of each place the lowest rank that has told what is there."""
    return {place: rank for rank, (place, named) in reversed(list(enumerate(told))) if named}


def named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones under the name that transformers saves, and the buffers that are saved."""
    saved = model.state_dict().keys() - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in saved - tied}
