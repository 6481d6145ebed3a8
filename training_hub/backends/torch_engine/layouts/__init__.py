"""Layouts: how model and samples lie over the processes of a run, and what follows for a step.

A way of dividing is a module of this package that changes a model from outside, into one whose weights are torch's
DTensors. What a step needs of all ways together (norms, pieces, whole weights) the tensors tell themselves: a DTensor
knows over which dimensions of the mesh it lies (`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from training_hub.backends.torch_engine.layouts import fully_sharded
from training_hub.backends.torch_engine.layouts.mesh import dense_mesh, place_in, size_of
from training_hub.backends.torch_engine.parallel import ALONE, Group
from training_hub.recipe.parallelism import Degrees, Parallelism, degrees_of
from training_hub.types import Pack

DATA = ("dp_replicate", "dp_shard")
"""Dimensions along which processes have samples of their own; along the others they share them."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How a run lies over its processes; by itself, as it is made, a process with everything.

    mesh: the processes by dimension; None where each holds the whole model and all are replicas.
    """

    group: Group = ALONE
    degrees: Degrees = field(default_factory=Degrees)
    mesh: DeviceMesh | None = None
    asked: Parallelism = field(default_factory=Parallelism)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_divided(self) -> bool:
        """Whether a forward pass takes several processes, which must then all make the same number of them."""
        return self.mesh is not None

    @property
    def data_size(self) -> int:
        """Into how many shares the samples of a step fall."""
        return self.group.world_size if self.mesh is None else size_of(self.mesh, *DATA)

    @property
    def data_rank(self) -> int:
        """The number of this process's share; processes with the same share have the same samples."""
        return self.group.rank if self.mesh is None else place_in(self.mesh, *DATA)

    @torch.no_grad()
    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over shares, the same bits in each process; the tensor itself is changed."""
        if self.mesh is None or self.data_size == self.group.world_size:
            return self.group.sum(numbers)
        for name in DATA:
            if name in (self.mesh.mesh_dim_names or ()):
                with self.group.explained("a sum"):
                    dist.all_reduce(numbers, group=self.mesh.get_group(name))
        return numbers

    def passes(self, own: Sequence[T]) -> list[T | None]:
        """What this process has to run, and None for each pass that it must make only because others have more."""
        count = self.group.highest([len(own)])[0] if self.is_divided else len(own)
        return [*own, *[None] * (count - len(own))]

    def rounds(self, packs: Iterable[Pack]) -> Iterator[tuple[Pack | None, int]]:
        """Packs dealt out one to each share in turn: this process's of each round, and the tokens of all of them.

        None where there are fewer left than shares; a pass must be made all the same where the model is divided.
        """
        mine: Pack | None = None
        tokens = number = 0
        for number, one in enumerate(packs, 1):
            tokens += len(one)
            if (number - 1) % self.data_size == self.data_rank:
                mine = one
            if number % self.data_size == 0:
                yield mine, tokens
                mine, tokens = None, 0
        if number % self.data_size:
            yield mine, tokens

    def divide(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Divide the model over the processes, in place, as the degrees say; it goes on computing in `dtype`.

        Everything that puts modules into the model or exchanges them must have happened. The order of the ways is that
        in which they must be applied: whatever cuts single weights first, what gathers whole layers last.
        """
        if self.mesh is not None:
            fully_sharded.shard(model, self.mesh, self.asked, dtype)

    def begin_pass(self, model: PreTrainedModel, *, is_last: bool) -> None:
        """Say, before a forward pass of a step, whether it is the last, in which all gradients are added up."""
        if self.mesh is not None:
            fully_sharded.begin_pass(model, self.asked, is_last=is_last)

    def end_passes(self, model: PreTrainedModel) -> None:
        """The backward passes of a step are over."""
        if self.mesh is not None:
            fully_sharded.end_passes(model)

    def let_go(self, model: PreTrainedModel) -> None:
        """Forget whole weights that were gathered, since the pieces have changed."""
        if self.mesh is not None:
            fully_sharded.let_go(model)

    def together(self, what: str, work: Callable[[], T]) -> T:
        """What `work`, which runs the model, gives: done by process 0 for all, or by all where it takes several."""
        return work() if self.is_divided else self.group.on_main(what, work)


WHOLE = Layout()


def layout_of(asked: Parallelism, group: Group, device: torch.device) -> Layout:
    """The layout that a recipe asks for. Raises RecipeError where its degrees do not fit the number of processes."""
    degrees = degrees_of(asked, group.world_size)
    mesh = dense_mesh(degrees, device, group.timeout_seconds) if degrees.is_divided else None
    return Layout(group, degrees, mesh, asked, device)
