"""Pipeline parallelism on paper: which layers each stage has, and which process has each stage."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism

DEGREE = "parallelism.pipeline_parallel_degree"
SCHEDULE = "parallelism.pipeline_parallel_schedule"
PER_STAGE = "parallelism.pipeline_parallel_layers_per_stage"


@dataclass(frozen=True)
class Order:
    """An order in which stages work. kind: torch's class for it. each: stages that a process has; None: two or more.

    turns: stages lie from the first process to the last and back, else over and over from the first to the last.
    splits: gradients of weights are made apart from those of activations, later.
    """

    kind: str
    each: int | None = 1
    turns: bool = False
    splits: bool = False


ORDERS: Mapping[str, Order] = {
    "1F1B": Order("Schedule1F1B"),
    "GPipe": Order("ScheduleGPipe"),
    "Interleaved1F1B": Order("ScheduleInterleaved1F1B", each=None),
    "InterleavedZeroBubble": Order("ScheduleInterleavedZeroBubble", each=None, splits=True),
    "ZBVZeroBubble": Order("ScheduleZBVZeroBubble", each=2, turns=True, splits=True),
}
"""By torchtitan's names. Sources: Huang et al. 2019, arXiv:1811.06965 (GPipe); Narayanan et al. 2021, arXiv:2104.04473
(1F1B, interleaved); Qi et al. 2024, arXiv:2401.10241 (zero bubble)."""


@dataclass(frozen=True)
class Stages:
    """ends: for each stage the number of the layer after its last one. owners: the process of the pipeline that has it,
    by its number there."""

    ends: tuple[int, ...]
    owners: tuple[int, ...]

    def layers(self, stage: int) -> range:
        """The numbers of its layers."""
        return range(self.ends[stage - 1] if stage else 0, self.ends[stage])

    def of_layer(self, number: int) -> int:
        """The stage that has this layer."""
        return bisect_right(self.ends, number)

    @property
    def most_layers(self) -> int:
        """How many layers the process with the most has."""
        return max(sum(len(self.layers(stage)) for stage in self.of_process(place)) for place in set(self.owners))

    def of_process(self, place: int) -> tuple[int, ...]:
        """The stages that this process has."""
        return tuple(stage for stage, owner in enumerate(self.owners) if owner == place)


def stages_of(asked: Parallelism, layers: int) -> Stages:
    """The stages of a model of so many layers. Raises RecipeError where the settings do not make stages of them."""
    degree, order = asked.pipeline_parallel_degree, ORDERS[asked.pipeline_parallel_schedule]
    first, last = asked.pipeline_parallel_first_stage_less_layers, asked.pipeline_parallel_last_stage_less_layers
    each = _stages_of_each(asked, layers + first + last)
    count = degree * each
    if count > layers:
        most = layers // each
        remedy = f"Write at most {most}" if most else f"Write {SCHEDULE}: 1F1B and at most {layers}"
        raise RecipeError(
            f"{DEGREE}: {degree} processes with {each} stages each are {count} stages, but the model has {layers} "
            f"layers. {remedy}."
        )
    owners = tuple(_owner(stage, degree, turns=order.turns) for stage in range(count))
    return Stages(_ends(layers, count, first, last), owners)


def _stages_of_each(asked: Parallelism, weight: int) -> int:
    """How many stages each process has of a model whose parts count for `weight` layers."""
    degree, order = asked.pipeline_parallel_degree, ORDERS[asked.pipeline_parallel_schedule]
    wanted = order.each or 2
    if asked.pipeline_parallel_layers_per_stage is None:
        return wanted
    count = math.ceil(weight / asked.pipeline_parallel_layers_per_stage)
    each, left = divmod(count, degree)
    if not left and (each == order.each or (order.each is None and each >= 2)):
        return each
    told = f"{degree * wanted}" if order.each else f"a multiple of {degree} that is at least {2 * degree}"
    fitting = math.ceil(weight / (degree * wanted))
    write = f"Write {fitting}, or leave" if math.ceil(weight / fitting) == degree * wanted else "Leave"
    raise RecipeError(
        f"{PER_STAGE}: {asked.pipeline_parallel_layers_per_stage} makes {count} stages of what counts for {weight} "
        f"layers, but {asked.pipeline_parallel_schedule} over {degree} processes has {told}. {write} it out."
    )


def last_owner(asked: Parallelism) -> int:
    """The process of the pipeline, by its number there, that has the last stage."""
    return 0 if ORDERS[asked.pipeline_parallel_schedule].turns else asked.pipeline_parallel_degree - 1


def _owner(stage: int, degree: int, *, turns: bool) -> int:
    row, place = divmod(stage, degree)
    return degree - 1 - place if turns and row % 2 else place


def _ends(layers: int, count: int, first: int, last: int) -> tuple[int, ...]:
    """Where the stages end: about as many layers for each, fewer for those with embeddings and head, at least one."""
    whole, extra = divmod(layers + first + last, count)
    sizes = [whole + (stage < extra) for stage in range(count)]
    sizes[0] -= first
    sizes[-1] -= last
    while min(sizes) < 1:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(min(sizes))] += 1
    return tuple(sum(sizes[: stage + 1]) for stage in range(count))


def under_way(asked: Parallelism, stages: Stages, place: int, packs: float) -> float:
    """How many packs the process at this place of a pipeline keeps what its layers made of at most, of so many in a
    step; of a process with several stages those of a part of them, as a share of all.

    1F1B goes forward with one pack for each stage from here on; the others go on longer before they turn (torch's
    schedules of that name; Narayanan et al. 2021, section 2.2.2).
    """
    degree, schedule = asked.pipeline_parallel_degree, asked.pipeline_parallel_schedule
    if schedule == "GPipe":
        return packs
    if schedule == "1F1B":
        return min(packs, degree - place)
    if schedule == "ZBVZeroBubble":
        return min(packs, degree)
    each, steps = len(stages.ends) / degree, 1 if ORDERS[schedule].splits else 2
    round_ = packs / max(1, packs // degree)
    begun = (each - 1) * round_ + steps * (degree - 1 - place) + 1
    return min(packs, begun / each + (place / each if ORDERS[schedule].splits else 0))


def late(asked: Parallelism, stages: Stages, place: int, packs: float) -> tuple[float, float]:
    """Where gradients of weights are made later: how many packs the process at this place keeps what its layers made of
    when the gradients of most wait, and how many these are, counted as `under_way` does; else none.

    Counted in torch's schedules of that name, of 2 and 4 processes (tests/distributed/test_sliced_stages.py).
    """
    degree, order = asked.pipeline_parallel_degree, ORDERS[asked.pipeline_parallel_schedule]
    if not order.splits:
        return 0.0, 0.0
    each = len(stages.ends) / degree
    wait = min(packs, (2 * place + 1 if order.turns else place + 1) / each)
    most = under_way(asked, stages, place, packs)
    return min(most, (degree + place) / each) if order.turns and place else most, wait


def waiting(asked: Parallelism, packs: float) -> float:
    """The share of a step in which a process with one stage waits: (p - 1) / (m + p - 1) with m packs (Narayanan et al.
    2021, section 2.2.1). Several stages, and gradients that are made later, fill some of it."""
    beyond = asked.pipeline_parallel_degree - 1
    return beyond / (packs + beyond)
