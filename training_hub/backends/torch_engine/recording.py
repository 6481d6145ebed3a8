"""Forward and backward of a pack recorded as a CUDA graph and replayed, for models so small that they await their host.

A graph repeats the same operations on the same addresses. So packs are filled up to one of a few sizes, the numbers of
each are copied to where the graph of its size reads them, and gradients stay where they are. A size is run operation by
operation when it first comes, recorded when it comes again, and replayed from then on if the replay of another pack
learns what the operations learn of it.

Source of what a graph needs: PyTorch 2.11, "CUDA semantics", the part on CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_hub.backends.torch_engine.filling import TENSORS, FilledPack, Size, Untold, filled
from training_hub.backends.torch_engine.layouts import Done, Objective
from training_hub.backends.torch_engine.layouts.beforehand import world_size_of
from training_hub.backends.torch_engine.optim import Masters
from training_hub.backends.torch_engine.tensors import Term
from training_hub.recipe import Recipe
from training_hub.types import Console, Pack

MOST = 32
"""Sizes that are recorded; each holds its kernels, and all share the memory of activations."""

ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far losses and gradients of a replay may lie from those of the operations, relative to their norm; ROUGH for
16-bit numbers, whose gradients of attention are added up in any order."""

ROUGH = 0.05

NOT_REPLAYED = "training.cuda_graphs: each pack runs operation by operation, since"

Work = Callable[[], None]


def recording_problem(recipe: Recipe, device: torch.device) -> str | None:
    """Why packs cannot be recorded in a run of this recipe on this device, with the remedy; None where they can."""
    if not recipe.training.cuda_graphs:
        return None
    processes = world_size_of(recipe)
    if device.type != "cuda":
        return f"training.cuda_graphs: needs a CUDA device, this run is on {device.type}. Write false."
    if processes > 1:
        return f"training.cuda_graphs: gradients of {processes} processes are not added up within a graph. Write false."
    return None


def cuda_graphs() -> Callable[[Work], Work]:
    """What does work once, to have all that it needs ready, records it as a CUDA graph, and gives what replays that.

    All graphs share one pool of memory and are recorded on one stream. Other threads, in which a checkpoint may just be
    written, may use the device meanwhile.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(work: Work) -> Work:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record


@dataclass
class Recorded:
    """What is replayed for packs of one size: the tensors it reads, those it adds to, and what it has found."""

    place: FilledPack
    gradients: list[Tensor | None]
    replay: Work = lambda: None
    found: Term | None = None

    def __call__(self, pack: FilledPack) -> Term:
        self.place.copy_(pack)
        self.replay()
        assert self.found is not None
        losses = self.found.losses
        return Term(self.found.total.clone(), losses.clone() if losses is not None else None)


class Recorder:
    """Learns from the packs of a step as a layout of one process does, by replaying what it recorded where it can.

    budget: tokens of a large pack. record: takes work, which it may do on the way, and gives what repeats it.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        masters: Masters,
        budget: int,
        device: torch.device,
        console: Console,
        record: Callable[[Work], Work],
    ):
        self._model, self._objective, self._masters = model, objective, masters
        self._budget, self._device, self._console, self._record = budget, device, console, record
        # What a token of weight 1 is of the step.
        self._share = torch.ones((), dtype=torch.float64, device=device)
        self._seen: set[Size] = set()
        self._graphs: dict[Size, Recorded] = {}
        self.refused = ""
        masters.keeps_gradients = True

    @property
    def sizes(self) -> list[Size]:
        """Those that are replayed."""
        return list(self._graphs)

    def learn(self, packs: Sequence[Pack], divisor: float, last: Callable[[], None]) -> Iterator[Done]:
        """Forward and backward on a step's packs, of the sum of their terms divided by `divisor`; each once that is
        done. last: called before the last of them."""
        self._share.fill_(1 / divisor)
        self._refuse_others()
        for number, one in enumerate(packs, 1):
            if number == len(packs):
                last()
            size = Size.of(one, self._budget)
            given = filled(one, size, self._device)
            term = self._graph_of(size, one)(given)
            rows = given.rows[: int(np.count_nonzero(one.weights[1:]))]
            losses = term.losses[: len(rows)] if term.losses is not None else None
            yield one, replace(given, rows=rows), Term(term.total, losses)

    def _refuse_others(self) -> None:
        """Replay no more where gradients have been exchanged for others, which graphs do not know."""
        now = [weight.grad for weight in self._masters.weights.values()]
        if any(
            one is not other for graph in self._graphs.values() for one, other in zip(graph.gradients, now, strict=True)
        ):
            self._graphs.clear()
            self._refuse("gradients were exchanged for others between two steps")

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._console.say(f"{NOT_REPLAYED} {reason}")

    def _graph_of(self, size: Size, pack: Pack) -> Callable[[FilledPack], Term]:
        """What learns from packs of this size; `pack` is one."""
        is_new = size not in self._seen
        self._seen.add(size)
        if size not in self._graphs and not (is_new or self.refused or len(self._graphs) >= MOST):
            graph, reason = self._recorded(size, pack)
            if reason:
                self._refuse(reason)
            else:
                self._graphs[size] = graph
                if len(self._graphs) == 1:
                    self._console.say(f"training.cuda_graphs: packs of {size.tokens:,} tokens are replayed from now on")
        return self._graphs.get(size, self._pass)

    def _pass(self, pack: FilledPack) -> Term:
        term = self._objective(self._model, pack)
        (term.total * self._share.to(term.total.dtype)).backward()
        return Term(term.total.detach(), term.losses)

    def _recorded(self, size: Size, pack: Pack) -> tuple[Recorded, str]:
        """The graph of a size, of which `pack` is one; and why it cannot be used, "" where it can.

        Gradients of the step so far are afterwards what they were, and so is what random numbers come next."""
        place = filled(pack, size, self._device)
        own = {name: getattr(place, name).clone() for name in TENSORS}
        gradients = [weight.grad for weight in self._masters.weights.values()]
        graph = Recorded(replace(place, **own, lengths=Untold(place.lengths)), gradients)
        kept = [gradient.clone() if gradient is not None else None for gradient in gradients]
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            reason = self._try(graph, filled(_turned(pack), size, self._device))
        for weight, gradient, before in zip(self._masters.weights.values(), gradients, kept, strict=True):
            weight.grad = gradient
            if gradient is not None and before is not None:
                gradient.copy_(before)
        return graph, reason

    def _try(self, graph: Recorded, other: FilledPack) -> str:
        """Record the graph, and let it learn of another pack; why it cannot be used, "" where it can."""

        def work() -> None:
            graph.found = self._pass(graph.place)

        try:
            graph.replay = self._record(work)
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        now = [weight.grad for weight in self._masters.weights.values()]
        if any(one is not other for one, other in zip(graph.gradients, now, strict=True)):
            return "some weight has a gradient from some packs only"  # the graph would write where it should add
        return self._unlike(graph, other, [gradient for gradient in graph.gradients if gradient is not None])

    def _unlike(self, graph: Recorded, other: FilledPack, gradients: list[Tensor]) -> str:
        """What the graph learns of a pack, in these gradients, and the operations do not; "" where nothing is."""

        def learned(way: Callable[[FilledPack], Term]) -> tuple[Tensor, list[Tensor]]:
            torch._foreach_zero_(gradients)
            torch.manual_seed(0)
            return way(other).total, [gradient.clone() for gradient in gradients]

        wanted, theirs = learned(self._pass)
        found, ours = learned(graph)
        off = {"loss": _relative([found], [wanted]), "gradient": _relative(ours, theirs)}
        allowed = ALIKE.get(self._model.dtype, ROUGH)
        return ", ".join(f"its {name} is {by:.1%} off" for name, by in off.items() if not by <= allowed)


def _relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The norm of the difference over that of what is wanted."""
    norm = torch.nn.utils.get_total_norm
    apart = norm([one - other for one, other in zip(found, wanted, strict=True)])
    return float(apart / norm(wanted).clamp_min(1e-30))


def _turned(pack: Pack) -> Pack:
    """The documents of a pack in reverse order, with their tokens in reverse: another pack of the same size."""
    lengths = np.diff(pack.boundaries)[::-1]
    documents = [slice(start, end) for start, end in zip(pack.boundaries, pack.boundaries[1:], strict=False)][::-1]
    return Pack(
        ids=np.concatenate([pack.ids[one][::-1] for one in documents]),
        positions=np.concatenate([pack.positions[one] for one in documents]),
        weights=np.concatenate([pack.weights[one] for one in documents]),
        boundaries=np.concatenate([[0], np.cumsum(lengths)]).astype(pack.boundaries.dtype),
        samples=pack.samples[::-1],
    )
