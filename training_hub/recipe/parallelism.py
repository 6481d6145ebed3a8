"""The section of parallelism: how model and samples are divided over the processes of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from training_hub.errors import RecipeError
from training_hub.recipe.sections import Section

REST = -1


def _a_degree(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != REST):
        raise ValueError("allowed is a whole number of at least 1, or -1 for the rest of the processes")
    return value


Schedule = Literal["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "InterleavedZeroBubble", "GPipe"]

Degree = Annotated[int, BeforeValidator(_a_degree)]


class Parallelism(Section):
    """How model and samples are divided over the processes. The degrees multiply to the number of processes; the names
    are torchtitan's. With backend: jax read devices, those of all processes, for processes."""

    data_parallel_replicate_degree: Degree = -1
    """Groups of processes that each hold the whole model, and take a share of each step's samples. -1: the rest, that
    is as many as the other degrees leave."""

    data_parallel_shard_degree: Degree = 1
    """Processes over which weights, gradients and the optimizer's state are divided, each with a share of the samples
    (fully sharded data parallelism). -1: the rest; each group of replicas is then one process."""

    tensor_parallel_degree: Degree = 1
    """Processes over which attention heads, inner widths of MLPs, experts and the vocabulary are split. They share
    their samples, and exchange sums within each layer: best inside one node. -1: the rest."""

    disable_loss_parallel: bool = False
    """With tensor_parallel_degree, gather the head in each process for the loss, in place of taking the loss where each
    process has its part of the vocabulary. Takes the memory of the whole head."""

    sequence_parallel: bool = True
    """With tensor_parallel_degree, keep a slice of the tokens in each process between attention and MLPs, in place of
    all of them: layers keep less for their backward pass, in which inputs are gathered a second time."""

    context_parallel_degree: Degree = 1
    """Processes that each have a part of the tokens of every pack, for packs that are too long for one. They exchange
    keys and values within each attention layer. -1: the rest."""

    expert_parallel_degree: Annotated[int, Field(ge=1)] = 1
    """Processes over which the experts of a mixture are dealt out, each with tokens of its own, which are sent to their
    experts and back. Neighbours among those of data_parallel_shard_degree x context_parallel_degree x
    tensor_parallel_degree, which it divides; what is left of these divides the experts as it does other weights.
    With backend: jax it divides data_parallel_shard_degree."""

    pipeline_parallel_degree: Annotated[int, Field(ge=1)] = 1
    """Processes over which layers are dealt out in stages. Packs pass through the stages one after another, so that all
    of them work: give a step several packs for each stage (training.max_tokens_per_gpu)."""

    pipeline_parallel_schedule: Schedule = "1F1B"
    """The order in which stages go forward and back. 1F1B and GPipe have one stage in each process, the others
    several: they wait less and send more. The zero-bubble ones make gradients of weights while they would wait. GPipe
    goes forward with all packs of a step first, which takes the memory of all."""

    pipeline_parallel_layers_per_stage: Annotated[int, Field(ge=1)] | None = None
    """Layers of a stage, embeddings and head counted as the next two settings say. Left out: as many as make one stage
    for each process, or two where the schedule has several."""

    pipeline_parallel_first_stage_less_layers: Annotated[int, Field(ge=0)] = 1
    """For how many layers the embeddings count, so that the first stage has fewer."""

    pipeline_parallel_last_stage_less_layers: Annotated[int, Field(ge=0)] = 1
    """For how many layers the last norm and the head count, so that the last stage has fewer."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether the weights of a layer, gathered for its forward pass, are let go after it and gathered again for its
    backward pass, and a third time where a zero-bubble order makes gradients of weights later. never: weights and
    gradients stay whole from the first pack of a step to the last, which takes the memory of whole ones and sends
    least. default: always."""

    enable_cpu_offload: bool = False
    """Keep divided weights, gradients and the optimizer's state in the memory of the CPU, and let it make the
    optimizer's step. Needs GPUs."""


@dataclass(frozen=True)
class Degrees:
    """Into how many the processes fall along each dimension, by torchtitan's names, with which meshes are made.

    All but `ep` multiply to the number of processes; experts take theirs from dp_shard, cp and tp, the last of which
    are nearest.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Processes, or groups of them, that have samples of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def efsdp(self) -> int:
        """Groups of `ep` processes in one copy of the model, each of which has all experts."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def sharers(self) -> int:
        """How many processes work on one pack."""
        return self.cp * self.tp * self.pp

    @property
    def is_divided(self) -> bool:
        """Whether no process holds the whole model, or one does not have whole samples."""
        return self.world_size > self.dp_replicate


FIELDS = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
"""Dimensions that multiply to the number of processes, and the field of the section that gives each."""

EXPERTS = "expert_parallel_degree"
"""The field that gives `ep`."""

DATA = ("dp_replicate", "dp_shard")
"""Dimensions along which processes have samples of their own; along the others they share them."""


def degrees_of(asked: Parallelism, world_size: int) -> Degrees:
    """The degrees of a run in `world_size` processes. Of several that take the rest the last does, the others are 1.

    Raises RecipeError where they do not multiply to it.
    """
    found = {name: int(getattr(asked, field)) for name, field in FIELDS.items()}
    open_ends = [name for name, degree in found.items() if degree == REST]
    found |= dict.fromkeys(open_ends[:-1], 1)
    given = math.prod(degree for degree in found.values() if degree != REST)
    rest, left = divmod(world_size, given)
    if left or (rest != 1 and not open_ends):
        shown = {name: degree for name, degree in found.items() if degree != REST and (degree > 1 or name in DATA)}
        told = " x ".join(f"{FIELDS[name]} {degree}" for name, degree in shown.items())
        wanted = "divide" if open_ends else "multiply to"
        raise RecipeError(
            f"parallelism: {told} must {wanted} the number of processes, which is {world_size} (processes.procs x "
            f"processes.nodes). {_remedy(world_size, given, bool(open_ends))}"
        )
    found |= dict.fromkeys(open_ends[-1:], rest)
    return _with_experts(Degrees(**found), asked)


def _with_experts(dense: Degrees, asked: Parallelism) -> Degrees:
    """The degrees with that of experts. Raises RecipeError where experts cannot be dealt out so."""
    name, degree = f"parallelism.{EXPERTS}", asked.expert_parallel_degree
    there = dense.dp_shard * dense.cp * dense.tp
    if there % degree:
        told = " x ".join(f"{FIELDS[one]} {getattr(dense, one)}" for one in ("dp_shard", "cp", "tp"))
        allowed = ", ".join(str(number) for number in range(1, there + 1) if there % number == 0)
        raise RecipeError(
            f"{name}: {degree} does not divide {there}, the processes among which one copy of the model lies ({told}); "
            f"allowed: {allowed}."
        )
    if degree > 1 and dense.tp > 1 and not asked.sequence_parallel:
        raise RecipeError(
            f"{name}: {degree}, but with parallelism.sequence_parallel: false the {dense.tp} processes of "
            f"parallelism.{FIELDS['tp']} have the same tokens, and deal experts out among them. Write "
            "parallelism.sequence_parallel: true, or 1."
        )
    return replace(dense, ep=degree)


def _remedy(world_size: int, given: int, is_open: bool) -> str:
    if not is_open and world_size % given == 0:
        return f"Write parallelism.{FIELDS['dp_replicate']}: -1, which takes the rest."
    return f"Start {max(1, round(world_size / given)) * given} processes, or change a degree."
