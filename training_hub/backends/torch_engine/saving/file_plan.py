"""The files of a final model, planned by all processes: what each file holds, who has that, and who writes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written
from training_hub.backends.torch_engine.saving.exact_pieces import Exact
from training_hub.backends.torch_engine.saving.final_file import Parts, parts_of, reverted
from training_hub.backends.torch_engine.saving.growing_file import About

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.run import Run

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
    """tensors: all of the model, in the order of files. files: what each holds of which of them. writers: the process
    that writes each file. places: those of all processes. speakers: of each place the process that speaks for it."""

    tensors: Mapping[str, Kept]
    files: Mapping[str, Parts]
    writers: Mapping[str, int]
    places: Sequence[int]
    speakers: Mapping[int, int]

    def sender(self, name: str, file: str) -> int:
        """The process that has the whole tensor to write it, or to send it to who does."""
        place, writer = self.tensors[name].place, self.writers[file]
        return writer if self.places[writer] == place else self.speakers[place]


def planned(run: Run, exact: Exact, came: OpenBase, written: Written, size: str) -> FilePlan:
    """The plan of all processes, which must all call it. size: the most that a file holds, as transformers reads it."""
    from transformers.core_model_loading import dot_natural_key

    layout = run.layout
    place = layout.pipeline.route.place if layout.pipeline is not None else 0
    about = exact.about() if layout.is_first else {}
    told = run.group.gather([place, {name: [list(shape), _name_of(kind)] for name, (shape, kind) in about.items()}])
    found: dict[str, Kept] = {}
    for number, named in sorted(told, key=lambda each: each[0]):
        for name, (shape, kind) in named.items():
            found.setdefault(name, Kept(tuple(shape), getattr(torch, kind), number))
    # The order in which transformers writes a model that it has read.
    tensors = {name: found[name] for name in sorted(found, key=dot_natural_key)}
    speakers = {place: rank for rank, (place, named) in reversed(list(enumerate(told))) if named}
    kept = _kept_formats(run, exact, tensors, place, speakers, came, written)
    formats = {name: written.dtype if one.dtype.is_floating_point else one.dtype for name, one in tensors.items()}
    files = parted(run.model, tensors, formats | kept, size)
    places = [each[0] for each in told]
    return FilePlan(tensors, files, writers_of(tensors, files, places), places, speakers)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kept_formats(
    run: Run,
    exact: Exact,
    tensors: Mapping[str, Kept],
    place: int,
    speakers: Mapping[int, int],
    came: OpenBase,
    written: Written,
) -> dict[str, torch.dtype]:
    """The formats of weights that nothing has moved and that came in another than is written: whoever speaks for them
    looks, before any file begins, which says first what is in it."""
    is_speaker = speakers[place] == run.group.rank
    asked = {
        name
        for name, one in tensors.items()
        if is_speaker and one.place == place and came.may_stay(name, one.shape, written)
    }
    asked = {name for some in run.group.gather(sorted(asked)) for name in some}
    kept = {}
    for name in (one for one in tensors if one in asked and tensors[one].place == place):
        whole = exact.whole(name)
        same = came.unmoved([name], exact.completed(name, whole), written) if is_speaker else None
        if same is not None:
            kept[name] = _name_of(same.dtype)
    return {name: getattr(torch, kind) for some in run.group.gather(kept) for name, kind in some.items()}


def parted(
    model: Any, tensors: Mapping[str, Kept], formats: Mapping[str, torch.dtype], size: str
) -> dict[str, dict[str, Mapping[str, About] | None]]:
    """The files, and what each holds: parted as transformers parts them, which keeps together what lies in one storage,
    as the experts of a layer do."""
    from huggingface_hub import split_state_dict_into_shards_factory

    parts = parts_of(model, {name: (one.shape, formats[name]) for name, one in tensors.items()})
    blank = {name: torch.empty(one.shape, dtype=formats[name], device="meta") for name, one in tensors.items()}
    sources = {name: name for name in tensors}
    if None not in parts.values():
        blank = reverted(model, blank)
        sources = {key: name for name, part in parts.items() for key in part or ()}
    found = split_state_dict_into_shards_factory(
        blank,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        filename_pattern=PATTERN,
        max_shard_size=size,
    )
    files: dict[str, dict[str, Mapping[str, About] | None]] = {}
    for file, keys in found.filename_to_tensors.items():
        files[file], own = {}, set(keys)
        for name in dict.fromkeys(sources[key] for key in keys):
            part = parts[name]
            files[file][name] = None if part is None else {key: one for key, one in part.items() if key in own}
    return files


def writers_of(tensors: Mapping[str, Kept], files: Mapping[str, Parts], places: Sequence[int]) -> dict[str, int]:
    """Each file is written by a process that has the most of it, by these in turn; the first one by process 0."""
    turns: Counter[int] = Counter()
    found: dict[str, int] = {}
    for file, parts in files.items():
        numbers: Counter[int] = Counter()
        for name, part in parts.items():
            shapes = [tensors[name].shape] if part is None else [shape for shape, _ in part.values()]
            numbers[tensors[name].place] += sum(map(math.prod, shapes))
        place = numbers.most_common(1)[0][0] if found else places[0]
        ranks = [rank for rank, one in enumerate(places) if one == place]
        found[file] = ranks[turns[place] % len(ranks)]
        turns[place] += 1
    return found
