"""Whole weights for optimizers that need them: each divided weight is whole, for its part of a step, in one process.

Muon orthogonalises a matrix, GaLore decomposes one, Adafactor adds up rows and columns, 8-bit moments have blocks of
256 numbers: from slices none of them comes to the numbers of one process. So each such weight has an owner among the
processes that hold its pieces, and there lies what the optimizer keeps of it. In a step the pieces and those of the
gradient are sent to the owner, which moves the weight as a process by itself would, and sends the pieces back.

Owners have about as much each, and one weight each at a time, so that all compute side by side. A process sends and
gets three numbers for each that it holds, whatever the number of processes. Source of the idea: Liu et al. 2025,
arXiv:2502.16982, section 2.3 (there each process gathers the gradient and computes the same).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.layouts.pieces import Cut, cut_of
from training_hub.backends.torch_engine.parallel import shared_out


@dataclass(frozen=True)
class Owned:
    """A weight and the processes that have pieces of it, with their cuts; owner: one of them."""

    name: str
    owner: int
    cuts: Mapping[int, Cut]


class Owners:
    """Which process owns which of some divided weights. All processes must make it, with the same names.

    whole: those that this process owns, by name, with the shape of the whole; they have contents only in their turn.
    """

    def __init__(
        self,
        divided: Mapping[str, DTensor],
        names: Iterable[str],
        like: Tensor,
        group: dist.ProcessGroup | None = None,
    ):
        """like: of the format, and on the device, of the numbers that `turns` reads. group: the processes that have
        pieces of these weights; None: all of the run."""
        self.names, self._group = frozenset(names), group
        self._rank = dist.get_rank() if self.names else 0
        self._like = like
        self._rounds = list(_rounds(_shared(divided, sorted(self.names), group)))
        mine = [one.name for some in self._rounds for one in some if one.owner == self._rank]
        self.whole = {name: self._like.new_empty(divided[name].shape) for name in mine}
        for whole in self.whole.values():
            _empty(whole)

    def turns(self, read: Callable[[str], tuple[Tensor, Tensor | None]], write: Callable[[str, Tensor], None]) -> Any:
        """For each weight of this process's own its name, while the whole weight and its gradient are there; what it
        then is goes to all that have pieces. All processes must go through all turns.

        read: this process's piece of a weight and of its gradient, which all have or none. write: takes a piece back.
        """
        for some in self._rounds:
            shared = [one for one in some if self._rank in one.cuts]  # replicas have others of the same name
            pieces = {one.name: read(one.name) for one in shared}
            moved = [one for one in shared if pieces[one.name][1] is not None]
            own = next((one for one in moved if one.owner == self._rank), None)
            self._bring(moved, own, pieces)
            if own is not None:
                yield own.name
            self._give_back(moved, own, pieces, write)

    def _bring(self, moved: Sequence[Owned], own: Owned | None, pieces: Mapping[str, tuple[Tensor, Any]]) -> None:
        sent = {one.owner: torch.cat([part.reshape(-1) for part in pieces[one.name]]) for one in moved}
        sizes = {rank: 2 * math.prod(cut.sizes) for rank, cut in own.cuts.items()} if own is not None else {}
        parts = _exchanged(sent, sizes, self._like, self._group)
        if own is None:
            return
        whole = self.whole[own.name]
        whole.untyped_storage().resize_(whole.numel() * whole.element_size())
        whole.grad = torch.empty_like(whole)
        for rank, part in parts.items():
            cut = own.cuts[rank]
            half = part.numel() // 2
            whole[cut.slices], whole.grad[cut.slices] = part[:half].view(cut.sizes), part[half:].view(cut.sizes)

    def _give_back(
        self,
        moved: Sequence[Owned],
        own: Owned | None,
        pieces: Mapping[str, tuple[Tensor, Any]],
        write: Callable[[str, Tensor], None],
    ) -> None:
        sent = {}
        if own is not None:
            whole = self.whole[own.name]
            sent = {rank: whole[cut.slices].reshape(-1) for rank, cut in own.cuts.items()}
            whole.grad = None
        sizes = {one.owner: pieces[one.name][0].numel() for one in moved}
        parts = _exchanged(sent, sizes, self._like, self._group)
        if own is not None:
            _empty(self.whole[own.name])
        for one in moved:
            write(one.name, parts[one.owner].view(pieces[one.name][0].shape))


class Dealt:
    """Which process keeps what belongs to some divided weights as wholes, and how wholes and pieces pass between it and
    those that have pieces. All processes must make it, with the same names, and go through all that it gives.

    mine: the weights of which this process keeps it.
    """

    def __init__(self, divided: Mapping[str, DTensor], like: Tensor, group: dist.ProcessGroup | None = None):
        """like: of the format, and on the device, of what passes. group: as in Owners."""
        self.names, self._like, self._group = frozenset(divided), like, group
        self._rank = dist.get_rank() if self.names else 0
        self._rounds = list(_rounds(_shared(divided, sorted(self.names), group)))
        self.mine = frozenset(one.name for some in self._rounds for one in some if one.owner == self._rank)

    def brought(self, read: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """The name and the whole of each of `mine`, put together of what `read` gives in those that have pieces of it:
        all of them a piece, or none."""
        for some in self._rounds:
            shared = [one for one in some if self._rank in one.cuts]
            pieces = {one.owner: read(one.name) for one in shared}
            sent = {owner: piece.reshape(-1).to(self._like) for owner, piece in pieces.items() if piece is not None}
            own = next((one for one in shared if one.owner == self._rank in sent), None)
            sizes = {rank: math.prod(cut.sizes) for rank, cut in own.cuts.items()} if own is not None else {}
            parts = _exchanged(sent, sizes, self._like, self._group)
            del pieces, sent
            if own is not None:
                yield own.name, _put_together(own, parts, self._like)

    def given(self, names: Collection[str], make: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The name and this process's piece of each of `names` that it has a piece of, cut from what `make` gives where
        that is kept."""
        for some in self._rounds:
            shared = [one for one in some if self._rank in one.cuts and one.name in names]
            own, sent = next((one for one in shared if one.owner == self._rank), None), {}
            if own is not None:
                whole = make(own.name)
                sent = {rank: whole[cut.slices].reshape(-1) for rank, cut in own.cuts.items()}
            sizes = {one.owner: math.prod(one.cuts[self._rank].sizes) for one in shared}
            parts = _exchanged(sent, sizes, self._like, self._group)
            for one in shared:
                yield one.name, parts[one.owner].view(one.cuts[self._rank].sizes)


def _put_together(own: Owned, parts: Mapping[int, Tensor], like: Tensor) -> Tensor:
    whole = like.new_empty(own.cuts[own.owner].shape)
    for rank, part in parts.items():
        cut = own.cuts[rank]
        whole[cut.slices] = part.view(cut.sizes)
    return whole


def _empty(whole: Tensor) -> None:
    whole.untyped_storage().resize_(0)


def _exchanged(
    sent: Mapping[int, Tensor], received: Mapping[int, int], like: Tensor, group: dist.ProcessGroup | None
) -> dict[int, Tensor]:
    """Numbers from each process, by rank: so many as `received` says, for those sent to each."""
    ranks = _ranks(group)
    counts = [received.get(rank, 0) for rank in ranks]
    outward = torch.cat([sent[rank] for rank in ranks if rank in sent]) if sent else like.new_empty(0)
    inward = like.new_empty(sum(counts))
    leaving = [sent[rank].numel() if rank in sent else 0 for rank in ranks]
    dist.all_to_all_single(inward, outward, counts, leaving, group=group)
    return {rank: part for rank, part in zip(ranks, inward.split(counts), strict=True) if rank in received}


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group)


def _shared(divided: Mapping[str, DTensor], names: Sequence[str], group: dist.ProcessGroup | None) -> list[list[Owned]]:
    """The weights of each set of processes that share some, for every set that there is in the group."""
    if not names:
        return []
    all_ranks, most = _ranks(group), max(divided[name].dim() for name in names)
    rows = [_row(divided[name], most) for name in names]
    found = [torch.empty(len(names), 1 + 2 * most, dtype=torch.int64) for _ in all_ranks]
    dist.all_gather(found, torch.tensor(rows), group=group)
    places = dict(zip(all_ranks, torch.stack(found).tolist(), strict=True))
    groups: dict[tuple[int, ...], dict[str, dict[int, Cut]]] = {}
    for number, name in enumerate(names):
        shape = tuple(divided[name].shape)
        for first in sorted({places[rank][number][0] for rank in all_ranks}):
            ranks = [rank for rank in all_ranks if places[rank][number][0] == first]
            cuts = {rank: _cut(shape, places[rank][number][1:], most) for rank in ranks}
            groups.setdefault(tuple(ranks), {})[name] = cuts
    return [[*_dealt(ranks, weights)] for ranks, weights in groups.items()]


def _row(weight: DTensor, most: int) -> list[int]:
    """The lowest rank that shares this process's copy of a weight, and where its own piece lies."""
    cut, left = cut_of(weight), [0] * (most - weight.dim())
    return [min(sharers(weight)), *cut.starts, *left, *cut.sizes, *left]


def _cut(shape: tuple[int, ...], row: Sequence[int], most: int) -> Cut:
    return Cut(shape, tuple(row[: len(shape)]), tuple(row[most : most + len(shape)]))


def sharers(weight: DTensor) -> list[int]:
    """The ranks that hold the pieces of this process's copy of a weight."""
    ranks, here = weight.device_mesh.mesh, weight.device_mesh.get_coordinate() or ()
    for number in reversed(range(ranks.dim())):
        if weight.placements[number].is_replicate():
            ranks = ranks.select(number, here[number])
    return [int(rank) for rank in ranks.flatten().tolist()]


def _dealt(ranks: Sequence[int], weights: Mapping[str, Mapping[int, Cut]]) -> Iterator[Owned]:
    costs = {name: float(math.prod(cuts[ranks[0]].shape)) for name, cuts in weights.items()}
    for rank, names in zip(ranks, shared_out(costs, len(ranks)), strict=True):
        yield from (Owned(name, rank, weights[name]) for name in names)


def _rounds(groups: Sequence[Sequence[Owned]]) -> Iterator[list[Owned]]:
    """Weights that are on their way at a time: one of each owner."""
    lists: dict[int, list[Owned]] = {}
    for one in (one for some in groups for one in some):
        lists.setdefault(one.owner, []).append(one)
    for number in range(max((len(some) for some in lists.values()), default=0)):
        yield [some[number] for some in lists.values() if number < len(some)]
