"""Pipeline parallelism, the work: the packs of a step pass through the stages of torch's pipelines, forward and back.

A pack is a micro-batch. Each process of a pipeline makes the same packs from the data, so that only what layers say
passes between them: as long as the longest pack of the step, of which each stage takes what its pack has. The last
stage runs the objective, and has the terms.

Where processes split the heads of a stage each passes a slice of the tokens on, so that nothing passes twice.
"""

# L tokens that a process passes of the longest pack, D width of the model

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from training_hub.backends.torch_engine.as_forward import as_forward
from training_hub.backends.torch_engine.fused.swap import has_swapped_attention, is_ours, no_mask
from training_hub.backends.torch_engine.layouts.cut import Route
from training_hub.backends.torch_engine.layouts.sliced_stages import SlicedStages, sliced_stages_of
from training_hub.backends.torch_engine.layouts.stages import ORDERS, Order
from training_hub.backends.torch_engine.tensors import PackTensors, Term
from training_hub.recipe.parallelism import Parallelism

FORWARD = ("FORWARD", "SEND_F", "RECV_F")
"""torch's names for what processes do on the way forward."""

Objective = Callable[[Any, PackTensors], Term]


@dataclass(frozen=True)
class Pipeline:
    """The stages of this process among those of its pipeline. twice: the names of weights that the first and the last
    process both have, of a table of embeddings that is also the head."""

    route: Route
    order: Order
    twice: frozenset[str] = frozenset()

    @property
    def ends(self) -> tuple[int, int]:
        """The processes with the first stage and with the last one."""
        return self.route.stages.owners[0], self.route.stages.owners[-1]

    @property
    def at_once(self) -> int:
        """How many packs go through the stages together where nothing comes back: enough to keep all of them busy."""
        return 4 * len(self.route.stages.ends)

    @property
    def under_way(self) -> int | None:
        """How many packs may be under way at once; None: all of a step."""
        return None if self.order.kind == "ScheduleGPipe" else len(self.route.stages.ends)

    def has_copy(self, name: str) -> bool:
        """Whether an earlier process has this weight too, and speaks for it."""
        return name in self.twice and self.route.place == self.ends[1]

    def run(
        self,
        model: Any,
        objective: Objective,
        packs: Sequence[PackTensors],
        spare: Callable[[], PackTensors],
        wanted: int,
        divisor: float | None = None,
        made: Callable[[], None] = lambda: None,
    ) -> list[Term]:
        """The terms of the packs, in the process with the last stage; [] in the others. With a divisor backward follows
        forward, of the sum of the terms divided by it; `made` is called when gradients of weights may have been made.

        spare: a pack that counts nothing, to make as many as are `wanted`, and as the order takes.
        """
        if not wanted:
            return []
        count = self._fitting(wanted)
        work = _Work(model, self.route, objective, [*packs], len(packs), divisor, made)
        work.packs += [spare()] * (count - len(packs))
        learns = divisor is not None
        stages = [self._stage(work, stage, learns=learns) for stage in self.route.stages.of_process(self.route.place)]
        numbers = torch.arange(count)
        try:
            with torch.set_grad_enabled(learns):
                schedule = self._schedule(stages, count, learns=learns)
                given = (numbers,) if stages[0].is_first else ()
                schedule.step(*given, target=numbers, return_outputs=False)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # what a stage raised, which torch wraps
        return work.terms

    def _fitting(self, count: int) -> int:
        """The least number of packs from `count` on that the order can take."""
        degree = self.route.group.size()
        if self.order.kind == "Schedule1F1B":
            return max(count, degree)
        while self.order.each is None and count % max(1, count // degree):
            count += 1
        return count

    def _stage(self, work: _Work, number: int, *, learns: bool) -> Any:
        """torch's stage. What passes has a known shape, so that nothing is asked of the others about it."""
        count, route = len(self.route.stages.ends), self.route
        passing = torch.empty(1, work.longest, route.width, dtype=route.dtype, device="meta", requires_grad=learns)
        loss = torch.empty((), dtype=torch.promote_types(route.dtype, torch.float32), device="meta")
        is_first, is_last = number == 0, number == count - 1
        return _stage_class()(
            _Part(work, number),
            number,
            count,
            route.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if is_first else passing,
            output_args=loss.requires_grad_(learns) if is_last else passing,
            group=route.group,
        )

    def _schedule(self, stages: list[Any], count: int, *, learns: bool) -> Any:
        from torch.distributed.pipelining import schedules

        kind = getattr(schedules, self.order.kind)
        own = stages[0] if self.order.each == 1 else stages
        schedule = kind(own, count, loss_fn=_as_it_is if learns else None, scale_grads=False)
        if not (learns or self.order.each == 1):  # torch's stages that turn back cannot leave out going back
            actions: dict[int, list[Any]] = schedule.pipeline_order_with_comms
            schedule.pipeline_order_with_comms = {
                place: [one for one in some if one.computation_type.name in FORWARD] for place, some in actions.items()
            }
        return schedule

    @torch.no_grad()
    def add_up(self, weights: Mapping[str, Tensor]) -> None:
        """Add up the gradients of those weights that two processes have, so that both have the same bits; what neither
        has a gradient of stays without."""
        names = sorted(self.twice & weights.keys()) if self.ends[0] != self.ends[1] else []
        if not names:
            return
        is_there = torch.tensor([int(weights[name].grad is not None) for name in names])
        is_there += self._of_other_end(is_there)
        for weight in (weights[name] for name, there in zip(names, is_there.tolist(), strict=True) if there):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad += self._of_other_end(weight.grad)

    def _of_other_end(self, mine: Tensor) -> Tensor:
        """What the last process has where this one, which is the first, has this tensor; and the other way round."""
        group, theirs, (first, last) = self.route.group, torch.empty_like(mine), self.ends
        if self.route.place == first:
            dist.send(mine, group=group, group_dst=last)
            dist.recv(theirs, group=group, group_src=last)
        else:
            dist.recv(theirs, group=group, group_src=first)
            dist.send(mine, group=group, group_dst=first)
        return theirs

    @torch.no_grad()
    def collected(self, weights: dict[str, Tensor], about: Sequence[Any]) -> dict[str, Tensor]:
        """In the first process the weights of all, which are on their CPUs, by name; {} in the others.

        about: name, shape and format of what each process of the run has to send, by rank.
        """
        group = self.route.group
        if self.route.place > 0:
            for weight in weights.values():
                dist.send(weight.contiguous(), group=group, group_dst=0)
            return {}
        for place in range(1, group.size()):
            for name, shape, kind, _ in about[dist.get_global_rank(group, place)]:
                weights[name] = torch.empty(shape, dtype=getattr(torch, kind.removeprefix("torch.")))
                dist.recv(weights[name], group=group, group_src=place)
        return weights


def pipeline_of(route: Route, asked: Parallelism) -> Pipeline:
    """The pipeline of a model that was cut so."""
    return Pipeline(route, ORDERS[asked.pipeline_parallel_schedule], route.twice)


def _as_it_is(output: Tensor, target: Tensor) -> Tensor:
    """The loss that a last stage has made."""
    return output


@dataclass
class _Work:
    """One step's packs, `number` of which count, and what becomes of them."""

    model: Any
    route: Route
    objective: Objective
    packs: list[PackTensors]
    number: int
    divisor: float | None
    made: Callable[[], None]
    terms: list[Term] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """L."""
        return self.route.num_passed(max(pack.ids.shape[1] for pack in self.packs))

    def received(self, number: int, given: Tensor) -> Tensor:
        """What a stage begins with of a pack, from what the stage before passed, [1, L, D]."""
        length = self.packs[number].ids.shape[1]
        return self.route.taken(given[:, : self.route.num_passed(length)], length)

    def ends(self, number: int) -> tuple[Tensor, ...]:
        """What the last stage makes of a pack: what backward begins with."""
        term = self.objective(self.model, self.packs[number])
        if number >= self.number:
            return (0 * term.total,)
        self.terms.append(Term(term.total.detach(), term.losses))
        return (term.total if self.divisor is None else term.total / self.divisor,)

    def passes(self, number: int) -> tuple[Tensor, ...]:
        """What another stage makes of it, [1, L, D]."""
        pack, route = self.packs[number], self.route
        decoder = getattr(self.model, self.model.base_model_prefix)
        arguments = pack.arguments(decoder.forward)
        if is_ours(decoder) and has_swapped_attention(decoder):
            arguments["attention_mask"] = no_mask(pack.ids.device)
        with self._around_decoder(pack):
            decoder(**arguments)
        left, route.left = route.left, None
        assert left is not None
        passed = route.passed(left)
        made = pad(passed, (0, 0, 0, self.longest - passed.shape[1])).contiguous()
        # Where nothing below trains, the stages above still send back a gradient.
        return (made if made.requires_grad or self.divisor is None else made.requires_grad_(),)

    def _around_decoder(self, pack: PackTensors) -> AbstractContextManager[None]:
        """What the objective wants to happen as the decoder begins: in the first stage."""
        around: Callable[[Any, PackTensors], AbstractContextManager[None]] | None
        around = getattr(self.objective, "around_decoder", None)
        return around(self.model, pack) if around is not None and self.route.stage == 0 else nullcontext()


@cache
def _stage_class() -> Any:
    """torch's stage, but that it says when it has made gradients of weights by themselves, makes layers that forget
    again once for all of these, and asks for gradients of weights that lie in slices as they must be."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
    from torch.utils.checkpoint import GraphExecGroup

    class Stage(PipelineStage):
        submod: Any

        def backward_weight_one_chunk(self, *arguments: Any, **options: Any) -> None:
            with GraphExecGroup():
                super().backward_weight_one_chunk(*arguments, **options)
            self.submod.work.made()

        def backward_maybe_with_nosync(
            self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
        ) -> Any:
            sliced: SlicedStages | None = self.submod.sliced
            if sliced is None:
                return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            if backward_type == "full":
                with sliced.last(self.stage_index) if last_backward else nullcontext():
                    return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            # What torch would do, with the weights that forward used in place of their slices.
            if backward_type == "input":
                made, upstream = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
                return stage_backward_input(made, upstream, bwd_kwargs["input_values"], iter(sliced.weights))
            sliced.make(
                bwd_kwargs["param_groups"],
                lambda parts: stage_backward_weight(iter(sliced.weights), parts),
                is_last=last_backward,
            )
            return (), None

    return Stage


class _Part(nn.Module):
    """A stage as torch's pipelines call it: with what the stage before gave, for one pack after the other."""

    def __init__(self, work: _Work, stage: int):
        super().__init__()
        self.model, self.work, self.stage, self.number = work.model, work, stage, 0
        self.sliced = sliced_stages_of(work.model)

    def to(self, *arguments: Any, **options: Any) -> _Part:
        """Itself: torch would move slices onto the GPU that are kept in the host's memory."""
        return self

    def forward(self, given: Tensor) -> Tensor:
        work, number = self.work, self.number
        self.number += 1
        received = None if self.stage == 0 else work.received(number, given)
        is_last = self.stage == len(work.route.stages.ends) - 1
        with work.route.inside(self.stage, received):
            # An objective is a forward pass by itself: one within another would let weights go at the end of the inner.
            (made,) = work.ends(number) if is_last else as_forward(work.model, lambda: work.passes(number))
        return made
