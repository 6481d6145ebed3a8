"""Layouts: how model and samples lie over the processes of a run, and what follows for a step.

A way of dividing is a module of this package that changes a model from outside, into one whose weights are torch's
DTensors. What a step needs of all ways together (norms, pieces, whole weights) the tensors tell themselves: a DTensor
knows over which dimensions of the mesh it lies (`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.layouts import fully_sharded
from training_hub.backends.torch_engine.layouts.context import refuse_other_numbers, share_of, spread_tokens
from training_hub.backends.torch_engine.layouts.experts import deal_out_all
from training_hub.backends.torch_engine.layouts.fitness import split_problems
from training_hub.backends.torch_engine.layouts.mesh import dense_mesh, place_in, size_of
from training_hub.backends.torch_engine.layouts.pieces import is_copy
from training_hub.backends.torch_engine.layouts.tensor import split_tensors
from training_hub.backends.torch_engine.parallel import ALONE, Group
from training_hub.backends.torch_engine.preflight import evaluating
from training_hub.backends.torch_engine.tensors import PackTensors, to_device
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import DATA, Degrees, Parallelism, degrees_of
from training_hub.types import Pack

TOKENS = (*DATA, "cp")
"""Dimensions along which processes have tokens of their own, so that what each finds for a step is added up."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How a run lies over its processes; by itself, as it is made, a process with everything.

    mesh: the processes by dimension; None where each holds the whole model and all are replicas. summed: weights that
    are whole in each process of a group that splits heads, and used on the heads of each.
    """

    group: Group = ALONE
    degrees: Degrees = field(default_factory=Degrees)
    mesh: DeviceMesh | None = None
    asked: Parallelism = field(default_factory=Parallelism)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    summed: frozenset[str] = frozenset()

    @property
    def is_sharded(self) -> bool:
        """Whether weights are kept in slices and gathered layer by layer."""
        return self.degrees.dp_shard > 1

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
        """The sum over all tokens of a step, the same bits in each process; the tensor itself is changed."""
        if self.mesh is None or size_of(self.mesh, *TOKENS) == self.group.world_size:
            return self.group.sum(numbers)
        for group in self._groups(TOKENS):
            with self.group.explained("a sum"):
                dist.all_reduce(numbers, group=group)
        return numbers

    def is_copy(self, weight: DTensor) -> bool:
        """Whether another process, lower in rank, holds the same piece and speaks for it."""
        own = weight.device_mesh.mesh_dim_names or ()
        beside = [name for name in (self.mesh.mesh_dim_names or () if self.mesh is not None else ()) if name not in own]
        return is_copy(weight) or place_in(self.mesh, *beside) > 0

    def sum_gradients(self, weights: Mapping[str, Tensor], divided: Mapping[str, DTensor]) -> None:
        """Add up `grad` of each weight, by name, over the processes that found a part of it, where backward did not.

        divided: the parameters of those weights that are pieces. Over what a piece lies on backward has added up, or
        it is another piece there.
        """
        if self.mesh is None:
            self.group.sum_gradients(weights.values())
            return
        sorts: dict[tuple[str, ...], list[Tensor]] = {}
        for name, weight in weights.items():
            own = divided[name].device_mesh.mesh_dim_names or () if name in divided else ()
            wanted = (*TOKENS, "tp") if name in self.summed else TOKENS
            across = tuple(one for one in wanted if one not in own and size_of(self.mesh, one) > 1)
            sorts.setdefault(across, []).append(weight)
        for across, some in sorts.items():
            if across:
                self.group.sum_gradients(some, self._groups(across))

    def _groups(self, names: Iterable[str]) -> list[dist.ProcessGroup]:
        """Those of this process along these dimensions, as far as there is more than one process along them."""
        assert self.mesh is not None
        return [self.mesh.get_group(name) for name in names if size_of(self.mesh, name) > 1]

    def passes(self, own: Sequence[T]) -> list[T | None]:
        """What this process has to run, and None for each pass that it must make only because others have more."""
        count = self.group.highest([len(own)])[0] if self.is_divided else len(own)
        return [*own, *[None] * (count - len(own))]

    @property
    def asking_size(self) -> int:
        """How many processes, or groups of them that split weights, can be asked different things at a time."""
        return self.group.world_size if self.mesh is None else size_of(self.mesh, *TOKENS)

    @property
    def asking_rank(self) -> int:
        """The number of this process's among those."""
        return self.group.rank if self.mesh is None else place_in(self.mesh, *TOKENS)

    @contextmanager
    def in_step(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, this process may make any number of forward passes, without gradients; at the end it makes further
        ones for as long as others need its weights. All processes must come here."""
        if not self.is_divided:
            yield
            return
        # First of all hooks: which weights are gathered, all must have agreed to gather.
        hook = model.register_forward_pre_hook(lambda module, given: self._announce(), prepend=True)
        try:
            yield
        finally:
            hook.remove()
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad(), evaluating(model):
            while self.group.highest([0])[0]:
                model(input_ids=token, use_cache=False)

    def _announce(self) -> None:
        self.group.highest([1])

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

    def divide(self, model: PreTrainedModel, dtype: torch.dtype, undivided: Collection[str] = ()) -> Layout:
        """Divide the model over the processes, in place, as the degrees say; it goes on computing in `dtype`.

        undivided: names of parameters that stay whole in each process.

        Everything that puts modules into the model or exchanges them must have happened. The order of the ways is that
        in which they must be applied: whatever cuts single weights first, what gathers whole layers last. Gives the
        layout that knows which weights are `summed`. Raises RecipeError where the model cannot be divided so.
        """
        if self.mesh is None:
            return self
        problems = split_problems(model, self.degrees)
        if problems:
            raise RecipeError(problems)
        summed = split_tensors(model, self.mesh["tp"]) if self.degrees.tp > 1 else frozenset()
        dealt = deal_out_all(model, self.mesh["dp_shard"]) if self.degrees.ep > 1 else frozenset()
        if self.is_sharded:
            apart = dealt | {model.get_parameter(name) for name in undivided}
            fully_sharded.shard(model, self.mesh, self.asked, dtype, apart)
        return replace(self, summed=summed)

    def spread(self, model: PreTrainedModel) -> None:
        """Let the divided model attend over tokens of other processes. Its attention must have been chosen."""
        if self.degrees.cp > 1:
            spread_tokens(model)

    def refuse_other_numbers(self, model: PreTrainedModel, objective: Callable[..., Any], dtype: torch.dtype) -> None:
        """Raise RecipeError where a pack on several processes has another loss than the same pack in one, beyond what
        computing in `dtype` makes of it."""
        if self.mesh is None or self.degrees.cp == 1:
            return
        refuse_other_numbers(model, objective, self.mesh["cp"], self.device, dtype)

    def tensors(self, pack: Pack) -> PackTensors:
        """What this process has to compute of a pack, on its device."""
        if self.mesh is None or self.degrees.cp == 1:
            return to_device(pack, self.device)
        return share_of(pack, self.mesh["cp"], self.device)

    def begin_pass(self, model: PreTrainedModel, *, is_last: bool) -> None:
        """Say, before a forward pass of a step, whether it is the last, in which all gradients are added up."""
        if self.is_sharded:
            fully_sharded.begin_pass(model, self.asked, is_last=is_last)

    def end_passes(self, model: PreTrainedModel) -> None:
        """The backward passes of a step are over."""
        if self.is_sharded:
            fully_sharded.end_passes(model)

    def let_go(self, model: PreTrainedModel) -> None:
        """Forget whole weights that were gathered, since the pieces have changed."""
        if self.is_sharded:
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
