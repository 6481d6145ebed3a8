"""What a teacher said, made once over the data and kept on disk: its likeliest tokens, or tokens drawn from it."""

# N trained positions, R rows of one chunk, C tokens that both vocabularies have, K tokens kept

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training_hub.backends.torch_engine.objectives.distillation import Teaching
from training_hub.backends.torch_engine.objectives.targets import Targets
from training_hub.backends.torch_engine.parallel import ALONE, Group
from training_hub.backends.torch_engine.processor import give_back_memory
from training_hub.backends.torch_engine.teacher.facts import TeacherFacts
from training_hub.backends.torch_engine.teacher.form import Form
from training_hub.backends.torch_engine.teacher.online import Online
from training_hub.backends.torch_engine.tensors import PackTensors, put, to_device
from training_hub.data.cache import Cache, cache_folder, kept_in_parts, key_of
from training_hub.data.packing import pack_all
from training_hub.data.store import TokenStore
from training_hub.data.targets import Rows, TargetStore, borders, missing_parts, write_part
from training_hub.errors import DiskError
from training_hub.recipe import Recipe
from training_hub.types import Console

VERSION = 1  # of what is kept, beside the code that key_of counts in

Write = Callable[[int, Rows, np.ndarray], None]
"""Puts the rows of a part, by its number, with how many each of its samples has, where they are kept."""


@dataclass(frozen=True)
class Condensed:
    """What would be kept of a teacher's word, made when it is asked for: for a check, which trains nothing."""

    online: Online
    form: Form

    @property
    def common(self) -> int:
        return self.form.common

    @torch.no_grad()
    def targets(self, pack: PackTensors) -> Targets:
        generator = torch.Generator(pack.ids.device).manual_seed(self.form.seed)
        return self.form.targets(*self.form.kept(self.online.targets(pack), len(pack.rows), generator))

    def on_excerpts(self) -> Condensed:
        return Condensed(self.online.on_excerpts(), self.form)


@dataclass(frozen=True)
class Kept:
    """What is kept of a teacher's word, by the number of the sample; the teacher itself is not there any more."""

    store: TargetStore
    form: Form

    @property
    def common(self) -> int:
        return self.form.common

    def targets(self, pack: PackTensors) -> Targets:
        assert pack.on_host is not None
        rows, device = self.store.rows(pack.on_host.samples.tolist()), pack.ids.device

        def moved(array: np.ndarray) -> Tensor:
            here: Tensor = pack.of_trained(put(np.ascontiguousarray(array), device))
            assert len(here) == len(pack.rows)
            return here

        return self.form.targets(moved(rows.ids), None if rows.logs is None else moved(rows.logs), moved(rows.last))

    def on_excerpts(self) -> Teaching:
        return MadeUp(self.form)


@dataclass(frozen=True)
class MadeUp:
    """Targets that follow from the trained token alone: enough to compare two ways to the same loss."""

    form: Form

    @property
    def common(self) -> int:
        return self.form.common

    def targets(self, pack: PackTensors) -> Targets:
        steps_K = torch.arange(self.form.width, device=pack.ids.device)
        ids_NK = (pack.targets[:, None] + steps_K) % self.form.common
        last_N = torch.full((len(ids_NK),), 0.1, device=pack.ids.device)
        if self.form.kind == "sampled":
            return self.form.targets(ids_NK, None, last_N)
        mass = 0.9 if self.form.width < self.form.common else 1.0
        logs_K = torch.log_softmax(-steps_K / 4, -1) + float(np.log(mass))
        return self.form.targets(ids_NK, logs_K.expand(ids_NK.shape), last_N)

    def on_excerpts(self) -> MadeUp:
        return self


def kept_teaching(
    recipe: Recipe,
    facts: TeacherFacts,
    store: TokenStore,
    dtype: torch.dtype,
    load: Callable[[], Online],
    budget: int,
    console: Console,
    group: Group = ALONE,
) -> Kept:
    """The kept targets of `store`: those found under the hash of all they are made from, the others made now.

    load: the teacher, asked for only where something is missing. budget: tokens that it reads at once. group: the
    processes in whose slices it lies, which must all call this.
    """
    form = Form.of(recipe.distillation, facts.common, recipe.seed)
    starts, data = borders(store), recipe.data
    cache = Cache(cache_folder(data.cache_dir), data.cache_size * 1e9) if data.cache else None
    key = key_of(_made_from(form, facts, store, dtype))

    def find(folder: Path) -> list[int]:
        missing = missing_parts(folder, starts, console)
        if missing:
            _refuse_full_disk(folder, missing, starts, store, form)
        else:
            console.say(f"teacher: asked before, its targets taken from {folder}")
        return missing

    def ask(missing: list[int], write: Write) -> None:
        _ask_parts(missing, starts, store, form, load(), budget, console, write)
        give_back_memory()

    def make(folder: Path) -> None:
        if missing := find(folder):
            ask(missing, partial(write_part, folder))

    if group.world_size == 1:
        folder, use = kept_in_parts(cache, key, make, console)
    else:
        folder, use = _together(_Shelf(group, cache, key, console), find, ask)
    return Kept(TargetStore(folder, starts, form.width, keep_alive=use), form)


def _together(
    shelf: _Shelf, find: Callable[[Path], list[int]], ask: Callable[[list[int], Write], None]
) -> tuple[Path, object]:
    """As kept_in_parts, of what all processes must ask for together: each makes the same passes, and the first that
    misses something writes it. Those that do not find it then, in folders of their own, write after it."""
    while True:
        place, lacking = shelf.looked_for(find)
        writer = next((rank for rank, some in enumerate(lacking) if some), None)
        if writer is None:
            return place
        ask(lacking[writer], partial(shelf.write, place[0], shelf.group.rank == writer))
        if shelf.cache is None:
            return place


@dataclass(frozen=True)
class _Shelf:
    """Where the processes of a group keep what a teacher said: under `key` of the cache; without one each for itself.
    Whoever waits for another here does so for as long as that is alive."""

    group: Group
    cache: Cache | None
    key: str
    console: Console

    def looked_for(self, find: Callable[[Path], list[int]]) -> tuple[tuple[Path, object], list[list[int]]]:
        """The folder, with what must live as long as it is used, and the parts that each of the processes misses."""
        missing: list[int] = []
        found: list[tuple[Path, object]] = []

        def look() -> list[int]:
            found.append(kept_in_parts(self.cache, self.key, lambda place: missing.extend(find(place)), self.console))
            return missing

        lacking = self.group.each("what is kept of the teacher", look)
        return found[0], lacking

    def write(self, folder: Path, is_writer: bool, number: int, rows: Rows, counts: np.ndarray) -> None:
        def put() -> None:
            if self.cache is None:
                write_part(folder, number, rows, counts)
            elif is_writer:
                kept_in_parts(self.cache, self.key, lambda place: write_part(place, number, rows, counts), self.console)

        self.group.each("the writing of what the teacher said", put)


def _made_from(form: Form, facts: TeacherFacts, store: TokenStore, dtype: torch.dtype) -> dict[str, object]:
    """All that decides what is kept. Draws depend on the seed, likeliest tokens do not."""
    prompted = facts.prompted
    return {
        "targets": VERSION,
        "form": [form.kind, form.width, form.common, form.temperature, form.seed if form.kind == "sampled" else None],
        "teacher": facts.fingerprint,
        "dtype": str(dtype),
        "data": store.fingerprint,
        "read": None if prompted is None else [prompted.store.fingerprint, prompted.twins.tobytes().hex()],
    }


def _refuse_full_disk(folder: Path, missing: list[int], starts: list[int], store: TokenStore, form: Form) -> None:
    spans = [slice(starts[number], starts[number + 1]) for number in missing]
    needed = form.bytes_per_row * sum(int(store.trained_tokens[span].sum()) for span in spans)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(
            f"distillation.cache: {needed / 1e9:.3g} GB are needed in {folder}, and {free / 1e9:.3g} GB are free. Make "
            "room, name another folder as data.cache_dir, or keep less: distillation.top_k, distillation.samples."
        )


@torch.no_grad()
def _ask_parts(
    missing: list[int],
    starts: list[int],
    store: TokenStore,
    form: Form,
    online: Online,
    budget: int,
    console: Console,
    write: Write,
) -> None:
    spans = [range(starts[number], starts[number + 1]) for number in missing]
    total = sum(int(store.lengths[span.start : span.stop].sum()) for span in spans)
    with console.progress("asking the teacher", total, "tokens") as advance:
        for number, span in zip(missing, spans, strict=True):
            counts = store.trained_tokens[span.start : span.stop]
            write(number, _rows_of(span, counts, store, form, online, budget, number, advance), counts)


def _rows_of(
    span: range,
    counts: np.ndarray,
    store: TokenStore,
    form: Form,
    online: Online,
    budget: int,
    number: int,
    advance: Callable[[float], None],
) -> Rows:
    """The rows of the samples in `span`, in their order, whatever packs they are read in."""
    device = online.model.device
    generator = torch.Generator(device).manual_seed((form.seed * 1_000_003 + number) % 2**63)
    ends = np.cumsum(counts)
    ids, last = np.empty((ends[-1], form.width), np.int32), np.empty(ends[-1], np.float32)
    logs = np.empty((ends[-1], form.width), np.float32) if form.kind == "top_k" else None
    for one in pack_all(list(span), store.__getitem__, budget):
        tensors = to_device(one, device)
        made = form.kept(online.targets(tensors), len(tensors.rows), generator)
        places = [np.arange(ends[at] - counts[at], ends[at]) for at in (one.samples - span.start).tolist()]
        for kept, column in zip(made, (ids, logs, last), strict=True):
            if kept is not None and column is not None:
                column[np.concatenate(places)] = kept.cpu().numpy()
        advance(len(one))
    return Rows(ids, logs, last)
