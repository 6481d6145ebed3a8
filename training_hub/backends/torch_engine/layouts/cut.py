"""Pipeline parallelism, the model: a transformers model of which a process has the layers of its stages and no others.

What is there keeps its names, and the model's own code runs it: a layer of another process hands on what it is given.
Such a model runs in one of two ways. In a stage, it begins with what the stage before made and its layers say what the
stage gives. In a walk, which all processes of a pipeline make together, each stage's result is sent to all, so that the
model says in each of them what the whole model says, with gradients: for proofs, not for speed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_hub.backends.torch_engine.fused.exchange import Forward, made
from training_hub.backends.torch_engine.layouts.context import STATEFUL
from training_hub.backends.torch_engine.layouts.exchanges import TOKENS
from training_hub.backends.torch_engine.layouts.shared import exchange
from training_hub.backends.torch_engine.layouts.stages import DEGREE, Stages, stages_of
from training_hub.backends.torch_engine.layouts.tokens import Tokens, num_tokens
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism

ROUTE = "training_hub_route"
"""Attribute of a model in stages: its Route."""

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIMENSIONS = 6

CACHE = "past_key_values"
"""Keyword of transformers' layers."""

ELSEWHERE = "training_hub_elsewhere"
"""Attribute of a table that another process answers for: the Elsewhere that asks it."""


class Route:
    """Where a model in stages is run: in `stage`, from what it `received` to what it `left`; None: in a walk.

    place: the number of this process in its pipeline. width and dtype: of what passes from stage to stage. tokens: how
    these lie on the processes that split the heads of a stage, each of which passes a slice of them on to the one that
    has its place in the next stage; None where none do. twice: the names of what a table holds that is also the head,
    which the first and the last process both have.
    """

    twice: frozenset[str] = frozenset()

    def __init__(
        self,
        stages: Stages,
        group: dist.ProcessGroup,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        tokens: Tokens | None = None,
    ):
        self.stages, self.group, self.place = stages, group, group.rank()
        self.width, self.dtype, self.device, self.tokens = width, dtype, device, tokens
        self.stage: int | None = None
        self.received: Tensor | None = None
        self.left: Tensor | None = None

    @contextmanager
    def inside(self, stage: int, received: Tensor | None) -> Iterator[None]:
        """Within, the model runs as this stage."""
        self.stage, self.received, self.left = stage, received, None
        try:
            yield
        finally:
            self.stage = self.received = self.left = None

    @property
    def is_midway(self) -> bool:
        """Whether the model now runs as a stage whose result goes on to another."""
        return self.stage is not None and self.stage < len(self.stages.ends) - 1

    def num_passed(self, length: int) -> int:
        """How many of `length` tokens this process passes on."""
        return length if self.tokens is None else self.tokens.of_rank(length)

    def passed(self, hidden: Tensor) -> Tensor:
        """What this process passes on of what its stage left."""
        return hidden if self.tokens is None else self.tokens.passed(hidden)

    def taken(self, hidden: Tensor, length: int) -> Tensor:
        """What a stage begins with, from what this process was passed of `length` tokens."""
        return hidden if self.tokens is None else self.tokens.taken(hidden, length)

    def through(
        self, number: int, layer: Callable[..., Tensor], hidden: Tensor, /, *given: Any, **options: Any
    ) -> Tensor:
        """What comes out of the place of layer `number`: of the layer, where it is here and it is its turn."""
        own = self.stages.of_layer(number)
        is_end = number == self.stages.layers(own)[-1]
        if self.stage is None:
            if self.stages.owners[own] == self.place:
                hidden = layer(hidden, *given, **options)
            elif options.get(CACHE) is not None:
                _count(options[CACHE], number, hidden, options)
            return self.sent(hidden, self.stages.owners[own]) if is_end else hidden
        if own < self.stage:
            assert self.received is not None
            return self.received
        if own == self.stage:
            hidden = layer(hidden, *given, **options)
            self.left = hidden if is_end else None
        return hidden

    def sent(self, mine: Tensor, owner: int, *, is_told: bool = False) -> Tensor:
        """In a walk: the tensor of process `owner`, of whatever shape; its gradient is the sum of all processes'.

        is_told: what is sent is used alike in all, and has the gradient of `owner` alone.
        """
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        found: Tensor = _Sent.apply(mine if mine.is_floating_point() else anchor, anchor, self, owner, is_told)
        return found

    def told(self, number: int, beside: Tensor, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """In a walk: what `work` gives, `number` tensors, in the process with the last stage, which tells the others;
        `beside` is what the others have in its place. In the last stage it is what `work` gives."""
        if self.stage is not None:
            return work()
        owner = self.stages.owners[-1]
        mine = work() if owner == self.place else (beside,) * number
        return tuple(self.sent(one, owner, is_told=True) for one in mine)


def _count(cache: Any, number: int, hidden: Tensor, options: dict[str, Any]) -> None:
    """Let a cache of keys and values know how many tokens a layer of another process has seen, in place of what is kept
    of them there: decoders ask the first layer's how far an answer has come."""
    length = num_tokens(options) or hidden.shape[TOKENS]
    seen = hidden.new_zeros(len(hidden), 1, length, 1)
    cache.update(seen, seen, number)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, anchor: Tensor, route: Route, owner: int, is_told: bool) -> Tensor:
        ctx.route, ctx.owner, ctx.is_told = route, owner, is_told
        ctx.shape, ctx.dtype = mine.shape, mine.dtype
        return _sent(mine, route, owner)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        route: Route = ctx.route
        gradient = upstream[0]
        if not ctx.is_told:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=route.group)
        if route.place != ctx.owner:
            gradient = gradient.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
        return gradient, None, None, None, None


def _sent(mine: Tensor, route: Route, owner: int) -> Tensor:
    """The tensor of process `owner`, which first says its shape and format."""
    about = torch.zeros(DIMENSIONS + 2, dtype=torch.int64, device=route.device)
    if route.place == owner:
        numbers = [FORMATS.index(mine.dtype), mine.dim(), *mine.shape]
        about[: len(numbers)] = torch.tensor(numbers, device=route.device)
    dist.broadcast(about, group_src=owner, group=route.group)
    kind, dimensions, *sizes = about.tolist()
    if route.place == owner:
        found = mine.detach().clone(memory_format=torch.contiguous_format)
    else:
        found = torch.empty(sizes[:dimensions], dtype=FORMATS[kind], device=route.device)
    dist.broadcast(found, group_src=owner, group=route.group)
    return found


class Layers(nn.ModuleList):
    """The layers of a decoder, as many as ever, of which those of other processes are husks."""

    def __init__(self, layers: nn.ModuleList, own: Callable[[int], bool], route: Route):
        super().__init__()
        for number, layer in enumerate(layers):
            if own(number):
                self.add_module(str(number), layer)
        self.husks = [_husk(layer) for layer in layers]
        self.route = route

    def __len__(self) -> int:
        return len(self.husks)

    def __iter__(self) -> Iterator[Any]:
        return (Place(self, number) for number in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """A slice has places to be called. A single layer is itself where it is to run in the present stage."""
        if isinstance(index, slice):
            return list(self)[index]
        number = range(len(self))[index]
        is_present = self.route.stage is not None and number in self.route.stages.layers(self.route.stage)
        return self.at(number) if is_present else Place(self, number)

    def at(self, number: int) -> Any:
        """The layer, or what is left of it."""
        return self._modules.get(str(number)) or self.husks[number]


@dataclass(frozen=True)
class Place:
    """The place of one layer, to be called as the layer is. What else is asked of it, the layer answers."""

    layers: Layers
    number: int

    def __call__(self, hidden_states: Tensor, *given: Any, **options: Any) -> Tensor:
        layers = self.layers
        return layers.route.through(self.number, layers.at(self.number), hidden_states, *given, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layers.at(self.number), name)


def _husk(layer: Any) -> Any:
    """The layer without what it holds: its plain attributes, for which a decoder may ask."""
    return made(type(layer), {**vars(layer), "_parameters": {}, "_buffers": {}, "_modules": {}})


class Elsewhere(nn.Module):
    """A part of the model at one of its ends, of class `kind`, that process `owner` of the pipeline has."""

    def __init__(self, kind: type, route: Route, owner: int, *, is_told: bool):
        super().__init__()
        self.kind, self.route, self.owner, self.is_told = kind, route, owner, is_told

    def forward(self, given: Tensor) -> Tensor:
        """In a walk what the part says there; in a stage, which does not ask for it, something of a fitting shape."""
        route = self.route
        if route.stage is None:
            return route.sent(given, self.owner, is_told=self.is_told)
        if given.is_floating_point():
            return given
        return torch.zeros((), dtype=route.dtype, device=route.device).expand(*given.shape, route.width)


@dataclass(frozen=True)
class Ends:
    """The parts of a model by name: its table of embeddings, its layers, its last norm and its head."""

    table: str
    layers: str
    norm: str
    head: str

    @staticmethod
    def of(model: Any) -> Ends | None:
        """As transformers' plan for pipelines has them; None where it has none, or another kind of one."""
        plan = getattr(model.config.get_text_config(), "base_model_pp_plan", None) or {}
        base, names = model.base_model_prefix, {id(module): name for name, module in model.named_modules()}
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not plan or not hasattr(model, base) or id(table) not in names or id(head) not in names:
            return None
        parts = {name: getattr(getattr(model, base), name, None) for name in plan}
        lists = [name for name, part in parts.items() if isinstance(part, nn.ModuleList)]
        norm = list(plan)[-1]
        if len(lists) != 1 or not isinstance(parts[norm], nn.Module) or parts[norm] is parts[lists[0]]:
            return None
        return Ends(names[id(table)], f"{base}.{lists[0]}", f"{base}.{norm}", names[id(head)])


def pipeline_problems(model: Any, asked: Parallelism) -> list[str]:
    """Why the model, which may lie on the meta device, cannot be cut into stages as asked; [] where it can."""
    kind, ends = type(model).__name__, Ends.of(model)
    if ends is None:
        return [
            f"{DEGREE}: {asked.pipeline_parallel_degree}, but transformers has no plan for {kind} that says what its "
            "layers are. Write 1."
        ]
    inside = tuple(f"{name}." for name in (ends.table, ends.layers, ends.norm, ends.head))
    beside = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    if beside:
        return [
            f"{DEGREE}: {asked.pipeline_parallel_degree}, but {kind} has weights beside its layers that no stage would "
            f"have: {', '.join(beside[:3])}. Write 1."
        ]
    try:
        stages_of(asked, len(model.get_submodule(ends.layers)))
    except RecipeError as error:
        return error.problems
    return []


def answer_problems(model: Any) -> list[str]:
    """Why this model, which may lie on the meta device, cannot answer in stages; [] where it can."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    stateful = next((kind for kind in kinds if any(word in kind for word in STATEFUL)), None)
    if stateful is None:
        return []
    return [
        f"{DEGREE}: {type(model).__name__} has layers that hand a state from token to token ({stateful}), which it "
        "asks for in each stage as it answers. Write 1, or evaluation.generate: false, and evaluate the final model."
    ]


def cut(
    model: Any,
    asked: Parallelism,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Tokens | None = None,
) -> Route:
    """Take from the model, in place, what the stages of other processes have. What `pipeline_problems` refuses must
    not come here; what is split by heads, or dealt out as experts, must be so already. tokens: as in Route.

    Of a table that is also the head the first and the last process have a copy each, under the table's name.
    """
    ends = Ends.of(model)
    assert ends is not None
    layers, table, head = (model.get_submodule(name) for name in (ends.layers, ends.table, ends.head))
    stages = stages_of(asked, len(layers))
    width = model.config.get_text_config().hidden_size
    route = Route(stages, group, width, dtype, device, tokens)
    first, last = stages.owners[0], stages.owners[-1]
    is_tied = own_weight(head) is own_weight(table)
    if is_tied and first != last:  # with an adapter's part, which may be of both
        route.twice = frozenset(f"{ends.table}.{name}" for name, _ in table.named_parameters())
    own = Layers(layers, lambda number: stages.owners[stages.of_layer(number)] == route.place, route)
    model.set_submodule(ends.layers, own)
    for name, owner in ((ends.table, first), (ends.norm, last), (ends.head, last)):
        part, is_told = model.get_submodule(name), name == ends.head
        elsewhere = Elsewhere(type(part), route, owner, is_told=is_told)
        if owner == route.place:
            _send(part, route, owner, is_told=is_told)
        elif name == ends.table and is_tied and last == route.place:
            vars(part)[ELSEWHERE] = elsewhere  # not as a module of it, which would have a name
            exchange(model, name, part, _answered_elsewhere)
        else:
            model.set_submodule(name, elsewhere)
    setattr(model, ROUTE, route)
    return route


def own_weight(module: Any) -> Any:
    """The weight of a table or head; where rows of it train beside it, without these, which PEFT would put into it."""
    rows = getattr(module, "token_adapter", None)
    return getattr(module if rows is None else rows.base_layer, "weight", module)


def _answered_elsewhere(own: Any) -> Forward:
    """Of a table whose weight alone is wanted here."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        said: Tensor = vars(self)[ELSEWHERE](ids)
        return said

    return forward


def planned_stages(model: Any, asked: Parallelism) -> Stages:
    """The stages of a model that is whole; what `pipeline_problems` refuses must not come here."""
    ends = Ends.of(model)
    assert ends is not None
    return stages_of(asked, len(model.get_submodule(ends.layers)))


def names_of(model: Any, asked: Parallelism, place: int) -> frozenset[str]:
    """The parameters of a whole model that process `place` of the pipeline will have; what `pipeline_problems` refuses
    must not come here."""
    ends, stages = Ends.of(model), planned_stages(model, asked)
    assert ends is not None
    own = {number for stage in stages.of_process(place) for number in stages.layers(stage)}
    prefixes = [f"{ends.layers}.{number}." for number in own]
    prefixes += [f"{ends.table}."] if place == stages.owners[0] else []
    prefixes += [f"{ends.norm}.", f"{ends.head}."] if place == stages.owners[-1] else []
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes)))


def fullest(model: Any, asked: Parallelism) -> Any:
    """A copy without contents of a model, with as many layers as the process with the most; embeddings and head are
    there, though most processes have one of them or none."""
    ends = Ends.of(model)
    assert ends is not None
    copied = copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})
    layers, most = copied.get_submodule(ends.layers), planned_stages(model, asked).most_layers
    copied.set_submodule(ends.layers, layers[len(layers) - most :])
    copied.config.get_text_config().num_hidden_layers = most
    return copied


def _send(part: nn.Module, route: Route, owner: int, *, is_told: bool) -> None:
    """Let all processes have in a walk what the part says in process `owner`."""

    def send(module: nn.Module, given: Any, said: Tensor) -> Tensor:
        return said if route.stage is not None else route.sent(said, owner, is_told=is_told)

    part.register_forward_hook(send)


def is_midway(model: Any) -> bool:
    """Whether the model now runs as a stage whose result goes on to another."""
    route = route_of(model)
    return route is not None and route.is_midway


def route_of(model: Any) -> Route | None:
    """The route of a model in stages; None of one that is whole."""
    found: Route | None = getattr(model, ROUTE, None)
    return found
