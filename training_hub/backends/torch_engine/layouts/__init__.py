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

from training_hub.backends.torch_engine.as_forward import device_of
from training_hub.backends.torch_engine.layouts import fully_sharded
from training_hub.backends.torch_engine.layouts.context import refuse_other_numbers, share_of, spread_tokens
from training_hub.backends.torch_engine.layouts.cut import cut, names_of
from training_hub.backends.torch_engine.layouts.experts import deal_out_all, experts_of
from training_hub.backends.torch_engine.layouts.fitness import split_problems
from training_hub.backends.torch_engine.layouts.mesh import (
    EXPERT_TOKENS,
    dense_mesh,
    expert_mesh,
    groups_along,
    place_in,
    size_of,
    stage_group,
)
from training_hub.backends.torch_engine.layouts.pieces import is_copy, norm_of
from training_hub.backends.torch_engine.layouts.pipeline import Pipeline, pipeline_of
from training_hub.backends.torch_engine.layouts.rounds import batched, dealt_in_rounds
from training_hub.backends.torch_engine.layouts.sequence import refuse_other_loss, slice_tokens
from training_hub.backends.torch_engine.layouts.stages import last_owner
from training_hub.backends.torch_engine.layouts.tensor import split_tensors
from training_hub.backends.torch_engine.layouts.tokens import Tokens
from training_hub.backends.torch_engine.parallel import ALONE, Group
from training_hub.backends.torch_engine.preflight import evaluating
from training_hub.backends.torch_engine.tensors import PackTensors, Term, to_device
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import DATA, Degrees, Parallelism, degrees_of
from training_hub.types import Pack

TOKENS = (*DATA, "cp")
"""Dimensions along which processes have tokens of their own, so that what each finds for a step is added up."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

Objective = Callable[[Any, PackTensors], Term]
Done = tuple[Pack, PackTensors, Term]
"""A pack of this process, as tensors, and what an objective made of it."""


@dataclass(frozen=True)
class Layout:
    """How a run lies over its processes; by itself, as it is made, a process with everything.

    mesh: the processes by dimension; None where each holds the whole model and all are replicas. summed: weights that
    are whole in each process of a group that splits heads, and used on the heads or the slice of tokens of each.
    tokens: how tokens lie there, once the model is divided. experts: the same processes as experts lie on them, where
    these are dealt out. pipeline: how packs pass through a model of which this process has some layers.
    """

    group: Group = ALONE
    degrees: Degrees = field(default_factory=Degrees)
    mesh: DeviceMesh | None = None
    asked: Parallelism = field(default_factory=Parallelism)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    summed: frozenset[str] = frozenset()
    pipeline: Pipeline | None = None
    tokens: Tokens | None = None
    experts: DeviceMesh | None = None
    stage: dist.ProcessGroup | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether weights are kept in slices and gathered layer by layer."""
        return self.degrees.dp_shard > 1

    @property
    def is_backward_whole(self) -> bool:
        """Whether one backward pass makes gradients of activations and of weights."""
        return self.pipeline is None or not self.pipeline.order.splits

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

    @property
    def place(self) -> int:
        """A number that processes share which compute the same of the same samples, and draw the same dropout."""
        return self.data_rank if self.mesh is None else place_in(self.mesh, "pp", *DATA)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all that hold the same layers."""
        return self.group.is_main or (self.mesh is not None and place_in(self.mesh, *self._beside_stages) == 0)

    @property
    def _beside_stages(self) -> list[str]:
        """The dimensions of the mesh along which processes have the same layers."""
        names = self.mesh.mesh_dim_names or () if self.mesh is not None else ()
        return [name for name in names if name != "pp"]

    def is_second(self, name: str) -> bool:
        """Whether an earlier stage has this weight too."""
        return self.pipeline is not None and self.pipeline.has_copy(name)

    @torch.no_grad()
    def over_stages(self, numbers: Tensor, *, is_highest: bool = False) -> Tensor:
        """The sum over the processes of a pipeline, or the highest; the tensor itself is changed."""
        for group in groups_along(self.mesh, ("pp",)):
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX if is_highest else dist.ReduceOp.SUM, group=group)
        return numbers

    def sum_over_stages(self, numbers: Tensor) -> Tensor:
        """The sum over the processes of a pipeline, on the CPU; the numbers themselves where there are no stages."""
        return self.over_stages(numbers.to(self.device)).cpu()

    def told_by_stages(self, own: dict[str, Any]) -> dict[str, Any]:
        """What processes with other layers tell by name, as plain JSON, with what this one tells."""
        if self.degrees.pp == 1:
            return own
        return {name: told for some in self.group.gather(own) for name, told in some.items()}

    def names_here(self, model: PreTrainedModel) -> Collection[str]:
        """The parameters of a whole model that this process will have once it is in stages."""
        if self.degrees.pp == 1:
            return [name for name, _ in model.named_parameters()]
        return names_of(model, self.asked, place_in(self.mesh, "pp"))

    @property
    def has_last_stage(self) -> bool:
        """Whether this process has the last layers, and so what the model says."""
        return self.degrees.pp == 1 or place_in(self.mesh, "pp") == last_owner(self.asked)

    @property
    def alike(self) -> tuple[int, int]:
        """The number of this process among those with the same layers, and how many these are."""
        if self.mesh is None:
            return self.group.rank, self.group.world_size
        return place_in(self.mesh, *self._beside_stages), size_of(self.mesh, *self._beside_stages)

    @torch.no_grad()
    def sum_alike(self, numbers: Tensor) -> Tensor:
        """The sum over the processes with the same layers; the tensor itself is changed."""
        if self.degrees.pp == 1:
            return self.group.sum(numbers)
        for group in groups_along(self.mesh, self._beside_stages):
            dist.all_reduce(numbers, group=group)
        return numbers

    def collected(self, weights: dict[str, Tensor], marked: set[str]) -> tuple[dict[str, Tensor], frozenset[str]]:
        """In process 0 the weights of all stages, by name, from the CPUs of the first process of each; and the names
        that are `marked` in one."""
        if self.pipeline is None:
            return weights, frozenset(marked)
        about = self.group.gather(
            [[name, list(weight.shape), str(weight.dtype), name in marked] for name, weight in weights.items()]
        )
        names = frozenset(name for some in about for name, _, _, is_marked in some if is_marked)
        return self.pipeline.collected(weights, about), names

    @torch.no_grad()
    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all tokens of a step, the same bits in each process; the tensor itself is changed. Of a pipeline
        the process with the last stage has the numbers, the others zeros."""
        if self.mesh is None or size_of(self.mesh, *TOKENS, "pp") == self.group.world_size:
            return self.group.sum(numbers)
        for group in groups_along(self.mesh, (*TOKENS, "pp")):
            with self.group.explained("a sum"):
                dist.all_reduce(numbers, group=group)
        return numbers

    def is_copy(self, name: str, weight: Tensor) -> bool:
        """Whether another process, lower in rank, holds the same piece of this weight and speaks for it."""
        own = (weight.device_mesh.mesh_dim_names or ()) if isinstance(weight, DTensor) else ()
        mesh = self._mesh_of(own)
        names: tuple[str, ...] = (mesh.mesh_dim_names or ()) if mesh is not None else ()
        beside = [one for one in names if one not in own and one != "pp"]
        return is_copy(weight) or place_in(mesh, *beside) > 0 or self.is_second(name)

    def _mesh_of(self, dimensions: tuple[str, ...]) -> DeviceMesh | None:
        """All processes, as the weights lie on them that lie on these dimensions."""
        return self.experts if "ep" in dimensions else self.mesh

    def sum_gradients(self, weights: Mapping[str, Tensor], sources: Mapping[str, tuple[str, Tensor]]) -> None:
        """Add up `grad` of each weight, by name, over the processes that found a part of it, where backward did not.

        sources: by weight, the parameter whose gradient its own is, or is linear in, with its name. Over what a
        parameter lies on backward has added up, or there is another piece of it.
        """
        if self.mesh is None:
            self.group.sum_gradients(weights.values())
            return
        sorts: dict[tuple[DeviceMesh | None, tuple[str, ...]], list[Tensor]] = {}
        for name, weight in weights.items():
            source, parameter = sources[name]
            own = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
            mesh = self._mesh_of(own)
            tokens: tuple[str, ...] = (*TOKENS, "tp") if source in self.summed else TOKENS
            wanted = tokens if mesh is self.mesh else EXPERT_TOKENS
            across = tuple(one for one in wanted if one not in own and size_of(mesh, one) > 1)
            sorts.setdefault((mesh, across), []).append(weight)
        for (mesh, across), some in sorts.items():
            if across:
                self.group.sum_gradients(some, groups_along(mesh, across))
        if self.pipeline is not None:
            self.pipeline.add_up(weights)

    def norm(self, weights: Mapping[str, Tensor], divided: Mapping[str, Any], dealt: Iterable[Any] = ()) -> Tensor:
        """The norm of the gradients of these weights, by name, of all processes together, once they are added up.
        dealt: DTensors over whose processes others may have gradients to add where this one has none."""
        own = {name: weight for name, weight in weights.items() if not self.is_second(name)}
        pieces = [(weight.grad, divided.get(name)) for name, weight in own.items() if weight.grad is not None]
        return norm_of(pieces, self.device, groups_along(self.mesh, ("pp",)), dealt)

    def learn(
        self,
        model: PreTrainedModel,
        objective: Objective,
        packs: Sequence[Pack],
        divisor: float,
        spare: Callable[[], Pack],
        *,
        last: Callable[[], None] = lambda: None,
        made: Callable[[], None] = lambda: None,
    ) -> Iterator[Done]:
        """Forward and backward on a step's packs, of the sum of their terms divided by `divisor`; each once that is
        done. Of a pipeline the process with the last stage has them.

        spare: a pack for passes that count nothing, which other processes need this one for. last: called before the
        backward pass that completes the gradients, where there is one. made: called where they may have been made
        without autograd's hooks.
        """
        if self.pipeline is not None:
            self.begin_pass(model, is_last=False)  # which one is, each stage says as it comes
            yield from self._piped(model, objective, self.passes(packs), spare, divisor, made)
            self.end_passes(model)
            return
        passes = self.passes(packs)
        for number, one in enumerate(passes, 1):
            self.begin_pass(model, is_last=number == len(passes))
            if number == len(passes):
                last()
            tensors = self.tensors(model, one or spare())
            term = objective(model, tensors)
            (term.total / divisor if one is not None else 0 * term.total).backward()
            if one is not None:
                yield one, tensors, Term(term.total.detach(), term.losses)
        self.end_passes(model)

    def ask(
        self, model: PreTrainedModel, objective: Objective, packs: Iterable[Pack], spare: Callable[[], Pack]
    ) -> Iterator[tuple[list[Done], int]]:
        """What an objective makes of packs that are dealt out to all processes: of this one's, round by round, and how
        many tokens all of them had."""
        if self.pipeline is not None:
            for some in batched(dealt_in_rounds(packs, self.data_size, self.data_rank), self.pipeline.at_once):
                passes = [one for one, _ in some]
                done = list(self._piped(model, objective, passes, spare))
                yield done, sum(tokens for _, tokens in some)
            return
        for one, tokens in dealt_in_rounds(packs, self.data_size, self.data_rank):
            done = []
            if one is not None or self.is_divided:
                tensors = self.tensors(model, one or spare())
                term = objective(model, tensors)
                done = [(one, tensors, term)] if one is not None else []
            yield done, tokens

    def _piped(
        self,
        model: PreTrainedModel,
        objective: Objective,
        passes: Sequence[Pack | None],
        spare: Callable[[], Pack],
        divisor: float | None = None,
        made: Callable[[], None] = lambda: None,
    ) -> Iterator[Done]:
        assert self.pipeline is not None
        own = [one for one in passes if one is not None]
        wanted = len(passes) if self.is_sharded else len(own)
        tensors = [self.tensors(model, one) for one in own]
        terms = self.pipeline.run(
            model, objective, tensors, lambda: self.tensors(model, spare()), wanted, divisor, made
        )
        yield from zip(own, tensors, terms, strict=False)

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

    def divide(self, model: PreTrainedModel, dtype: torch.dtype, undivided: Collection[str] = ()) -> Layout:
        """Divide the model over the processes, in place, as the degrees say; it goes on computing in `dtype`.

        undivided: names of parameters that stay whole in each process.

        Everything that puts modules into the model or exchanges them must have happened. The order of the ways is that
        in which they must be applied: whatever cuts single weights first, what gathers whole layers last. Gives the
        layout that knows which weights are `summed`. Raises RecipeError where the model cannot be divided so.
        """
        if self.mesh is None:
            return self
        problems = split_problems(model, self.degrees, self.asked)
        if problems:
            raise RecipeError(problems)
        summed: frozenset[str] = frozenset()
        tokens = Tokens(self.mesh["tp"], are_sliced=self.asked.sequence_parallel) if self.degrees.tp > 1 else None
        if tokens is not None:
            summed = split_tensors(model, tokens, deals_experts=self.experts is None)
        if self.experts is not None:
            of_adapters = deal_out_all(model, self.experts["ep"])
            summed |= of_adapters if tokens is not None else frozenset()  # elsewhere they are added up in any case
        if tokens is not None and tokens.are_sliced:
            summed |= slice_tokens(model, tokens)
        pipeline = None
        if self.degrees.pp > 1:
            route = cut(model, self.asked, self.mesh.get_group("pp"), dtype, self.device, tokens)
            pipeline = pipeline_of(route, self.asked)
        if self.is_sharded:
            # Of those of other stages there are none.
            apart = frozenset(one for name, one in model.named_parameters() if name in undivided)
            dealt = [module for _, module in experts_of(model)] if self.experts is not None else []
            fully_sharded.shard(model, self.mesh, self.asked, dtype, apart, dealt, self.experts)
        return replace(self, summed=summed, tokens=tokens, pipeline=pipeline)

    def spread(self, model: PreTrainedModel) -> None:
        """Let the divided model attend over tokens of other processes. Its attention must have been chosen."""
        if self.degrees.cp > 1:
            spread_tokens(model)

    def refuse_other_numbers(self, model: PreTrainedModel, objective: Callable[..., Any], dtype: torch.dtype) -> None:
        """Raise RecipeError where a pack whose tokens lie on several processes has another loss than the same pack in
        one, beyond what computing in `dtype` makes of it."""
        if self.mesh is not None and self.degrees.cp > 1:
            refuse_other_numbers(model, objective, self.mesh["cp"], self.device, dtype)
        if self.tokens is not None and self.tokens.are_sliced:
            refuse_other_loss(model, objective, self.tokens, self.device, dtype)

    def tensors(self, model: PreTrainedModel, pack: Pack) -> PackTensors:
        """What this process has to compute of a pack, where its model computes."""
        if self.mesh is None or self.degrees.cp == 1:
            return to_device(pack, device_of(model))
        return share_of(pack, self.mesh["cp"], device_of(model))

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
    experts = expert_mesh(degrees, device, group.timeout_seconds) if degrees.ep > 1 else None
    stage = stage_group(mesh, group.timeout_seconds) if mesh is not None else None
    return Layout(group, degrees, mesh, asked, device, experts=experts, stage=stage)
