"""The optimizer step: gradients summed in float32, clipped, applied to float32 weights.

The optimizer owns precision. A parameter in bfloat16 carries a float32 master here: gradients of the micro-steps are
added up in the master's format, torch's optimizer moves the master, and the parameter becomes its rounding. bfloat16
has 8 bits of mantissa, so without a master a step at learning rate 1e-6 rounds to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.early_sums import EarlySums
from training_hub.backends.torch_engine.fused.products import hold_gradient, release_gradient
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.layouts.owners import Owners
from training_hub.backends.torch_engine.layouts.pieces import cut_like, local_of
from training_hub.backends.torch_engine.optimizers import library, saved
from training_hub.backends.torch_engine.optimizers.both import Both
from training_hub.backends.torch_engine.optimizers.compact import CompactAdamW
from training_hub.backends.torch_engine.optimizers.split import join, split
from training_hub.backends.torch_engine.optimizers.whole import wants_whole
from training_hub.backends.torch_engine.saving.base_weights import UNREAD, BaseWeights, OpenBase
from training_hub.recipe.sections import Optimizer as OptimizerSettings

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.adaptations.protocol import Adaptation

FUSED = frozenset({"AdamW", "Adam", "SGD", "Adagrad"})  # have fused kernels on CPU and CUDA in torch 2.11 and later
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Masters:
    """The weights the optimizer moves, by name: parameters themselves, or float32 masters of low-precision ones.

    are_split: a low-precision parameter stays itself, with a float32 gradient, and `extras` hold the bits that make it
    a float32 master. An adaptation may claim parameters, which it moves itself, and add weights of its own.

    are_held: products may add their gradients of low-precision parameters to those of the masters themselves.
    keeps_gradients: those of all weights stay where they are from step to step.

    Of a parameter that is divided over processes the optimizer moves this one's piece. sources: by weight, the name of
    the parameter whose gradient its own is, or is made from, and that parameter. dealt: by name, those parameters of
    which what the adaptation adds lies in one of the processes that have pieces. published: called once weights have
    changed, for whatever was made of them before. base: the weights as they came, where masters begin that are finer
    than their parameters; `rounded`: those that begin as the parameters, since the base says something else.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        adaptation: Adaptation | None = None,
        *,
        are_split: bool = False,
        are_held: bool = True,
        published: Callable[[], None] = lambda: None,
        base: BaseWeights = UNREAD,
    ):
        self._published = published
        self.adaptation = adaptation
        self.keeps_gradients = False
        claimed = adaptation.claimed if adaptation is not None else ()
        named = dict(named_parameters)
        self.parameters = {name: p for name, p in named.items() if p.requires_grad and name not in claimed}
        self.weights: dict[str, Tensor] = {}
        self.extras: dict[str, Tensor] = {}
        self._low: list[str] = []
        self._hooks: list[Any] = []
        self._moves: dict[str, Callable[[Tensor], None]] = {}
        self.divided: dict[str, DTensor] = {}
        with base.opened() as came:
            for name, parameter in self.parameters.items():
                self._take(name, parameter, came, are_split=are_split, are_held=are_held)
            self.rounded = came.unlike
        writes_beside = adaptation is not None and adaptation.files is not None  # and so nothing of the base
        base.let_go(list(base.held) if writes_beside else self.parameters)
        self.added = adaptation.weights() if adaptation is not None else {}
        of_added = adaptation.sources() if adaptation is not None else {}
        self.sources = {name: (name, p) for name, p in self.parameters.items()}
        self.sources |= {name: (source, named[source]) for name, source in of_added.items()}
        self.dealt = {name: named[name] for name in sorted(adaptation.dealt)} if adaptation is not None else {}
        self.weights |= self.added

    def _take(self, name: str, parameter: nn.Parameter, came: OpenBase, *, are_split: bool, are_held: bool) -> None:
        is_divided = isinstance(parameter, DTensor)
        if isinstance(parameter, DTensor):
            self.divided[name] = parameter
        if parameter.dtype not in LOW_PRECISION:
            self.weights[name] = local_of(parameter) if is_divided else parameter
            return
        master = local_of(parameter.detach()).float()
        exact = came.finer(name, parameter)
        if exact is not None:
            master.copy_(exact)
        if are_split:
            own = local_of(parameter) if is_divided else parameter
            parameter.grad_dtype = own.grad_dtype = torch.float32
            rounded, self.extras[name] = split(master)
            own.data.copy_(rounded)
            self.weights[name] = own
            if not is_divided:
                hold_gradient(parameter, parameter)
            return
        self.weights[name] = master
        self._low.append(name)
        if are_held and not is_divided:
            hold_gradient(parameter, master)
        self._moves[name] = _move_grad_to(master)
        self._hooks.append(parameter.register_post_accumulate_grad_hook(self._moves[name]))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters that forward and backward use."""
        if self._low:
            torch._foreach_copy_(
                [local_of(self.parameters[name].data) for name in self._low], [self.weights[name] for name in self._low]
            )
        self._published()

    @torch.no_grad()
    def put(self, name: str, piece: Tensor) -> None:
        """Let the weight `name`, or this process's piece of it, be this one, before all are published."""
        if name in self.extras:
            piece, extra = split(piece)
            self.extras[name].copy_(extra)
        self.weights[name].copy_(piece)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over `weights` by name, bit for bit, and publish them."""
        for name in self.weights:
            self.put(name, weights[name])
        self.publish()
        if self.adaptation is not None:
            self.adaptation.load(weights)

    @torch.no_grad()
    def exact(self, name: str) -> Tensor:
        """The weight `name` as the optimizer moves it; of a split one a float32 copy."""
        return join(self.weights[name], self.extras[name]) if name in self.extras else self.weights[name]

    def all_exact(self) -> dict[str, Tensor]:
        """Every weight as the optimizer moves it; copies of split ones lie on the CPU, where there is room for all."""
        return {**self.weights, **{name: self.exact(name).cpu() for name in self.extras}}

    def saved(self) -> dict[str, Tensor]:
        """What `load` takes."""
        return {**self.all_exact(), **(self.adaptation.saved() if self.adaptation is not None else {})}

    def collect(self) -> None:
        """Add gradients of low-precision parameters to their masters', where something else than backward made them."""
        for name, move in self._moves.items():
            move(self.parameters[name])
        if self.adaptation is not None:
            self.adaptation.collect()

    def gather(self) -> None:
        """The gradients of a step are complete: let the adaptation make those of its weights from them."""
        for name, parameter in self.divided.items():
            if parameter.grad is not None:
                self.weights[name].grad = local_of(cut_like(parameter.grad, parameter))
                parameter.grad = None
        if self.adaptation is not None:
            self.adaptation.gather()

    def release(self) -> None:
        """Let go of the parameters: their gradients are their own again, for whoever trains the model next."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters.values():
            release_gradient(parameter)
            if parameter.dtype in LOW_PRECISION:
                parameter.grad_dtype = parameter.dtype

    def drop_gradients(self) -> None:
        """Forget all gradients, and free their memory; zeros in their place where a graph adds to them there."""
        if self.keeps_gradients:
            torch._foreach_zero_([weight.grad for weight in self.weights.values() if weight.grad is not None])
            return
        for weight in (*self.parameters.values(), *self.weights.values()):
            weight.grad = None
        if self.adaptation is not None:
            self.adaptation.drop_gradients()


def _move_grad_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        gradient = local_of(cut_like(gradient, parameter))
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return move


class Updater:
    """The optimizer over the masters: clip, step, publish. tables: names of embeddings and the head.

    layout: how model and samples lie over processes, whose gradients are added up before they are clipped.
    """

    def __init__(
        self,
        masters: Masters,
        settings: OptimizerSettings,
        max_norm: float,
        tables: Collection[str] = (),
        layout: Layout = WHOLE,
    ):
        self.masters = masters
        self.layout = layout
        self.max_norm = max_norm
        are_complete = masters.adaptation is None or not masters.adaptation.adds_gradients
        are_replicas = layout.group.world_size > 1 and not layout.is_divided
        self.early: EarlySums | None = None
        if are_replicas and are_complete:
            self.early = EarlySums(layout.group, masters.parameters, masters.weights)
        whole = {
            name
            for name, weight in masters.divided.items()
            if wants_whole(settings, tuple(weight.shape), weight.dim() == 2 and name not in tables)
        }
        like = masters.exact(min(whole)) if whole else torch.empty(0)
        self.owners = Owners(masters.divided, whole, like, layout.stage)
        self.moved = {**{n: w for n, w in masters.weights.items() if n not in whole}, **self.owners.whole}
        self.optimizer = self._build(settings, tables)

    def _build(self, settings: OptimizerSettings, tables: Collection[str]) -> torch.optim.Optimizer:
        """The optimizer of what this process moves: its pieces, and in their turns the whole weights that it owns."""
        masters, owners = self.masters, self.owners

        def of(weights: dict[str, Tensor]) -> torch.optim.Optimizer:
            extras = {
                name: extra for name, extra in masters.extras.items() if weights.get(name) is masters.weights[name]
            }
            return build_optimizer(weights, settings, masters.added, extras, tables)

        if not owners.names:
            return of(self.moved)
        pieces = {name: weight for name, weight in self.moved.items() if name not in owners.whole}
        beside = [of(pieces)] if pieces else []
        each = {name: of({name: weight}) for name, weight in owners.whole.items()}

        def turns() -> Iterator[torch.optim.Optimizer]:
            yield from beside
            for name in owners.turns(lambda one: (masters.exact(one), masters.weights[one].grad), masters.put):
                yield each[name]

        return Both([*beside, *each.values()], turns)

    def expect_last_backward(self) -> None:
        """The backward pass that comes completes the gradients of a step: let replicas add them up as they come."""
        if self.early is not None:
            self.early.begin()

    def end_backward(self) -> None:
        """The backward passes of a step are over; to be called before processes say anything else to each other."""
        if self.early is not None:
            self.early.send_rest()

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale gradients down to `max_norm`; their norm before that, over all weights, as a float32 scalar.

        What an adaptation makes of the gradients is linear in them, and less: so that is what processes add up.
        """
        self.masters.gather()
        if self.layout.is_divided:
            return self._clip_pieces()
        if self.early is not None:
            self.early.finish()
        else:
            self.layout.group.sum_gradients(self.masters.weights.values())
        gradients = [weight.grad for weight in self.masters.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._scale(gradients, norm)
        return norm

    def _clip_pieces(self) -> Tensor:
        """The same where weights are divided."""
        masters = self.masters
        self.layout.sum_gradients(masters.weights, masters.sources)
        added = {name: source for name, (of, source) in masters.sources.items() if of in masters.dealt}
        norm = self.layout.norm(masters.weights, {**masters.divided, **added}, masters.dealt.values())
        self._scale([weight.grad for weight in masters.weights.values() if weight.grad is not None], norm)
        return norm

    def _scale(self, gradients: list[Tensor], norm: Tensor) -> None:
        """As torch.nn.utils.clip_grad_norm_ does, which takes no weights of different meshes; or have it done by an
        optimizer that can as it reads them."""
        if self.max_norm <= 0 or not gradients:
            return
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device)
        if isinstance(self.optimizer, CompactAdamW):
            self.optimizer.scale_gradients(factor)
        else:
            torch._foreach_mul_(gradients, factor)

    def step(self, learning_rate: float) -> None:
        """Move the weights by their gradients, and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        begin_momentum(self.optimizer)
        self.optimizer.step()
        self.masters.publish()
        self.masters.drop_gradients()

    def release(self) -> None:
        """Let go of the parameters."""
        self.masters.release()
        if self.early is not None:
            self.early.release()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, model and masters are what is measured and exported: the average of a schedule-free optimizer's
        steps, of any other the weights as they are. After it they are as before, bit for bit."""
        if not library.is_averaging(self.optimizer):
            yield
            return
        with library.averaged(self.optimizer):
            self.masters.publish()
            yield
        self.masters.publish()

    def state(self) -> dict[str, Tensor]:
        """What the optimizer keeps, by `weight name/state name`; of torch's own nothing before the first step."""
        kept = {
            f"{name}/{key}": value
            for name, weight in self.moved.items()
            for key, value in saved.tensors_of(self.optimizer.state.get(weight, {})).items()
        }
        return {**kept, **saved.numbers_of(self.optimizer.param_groups)} if kept else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, bit for bit."""
        names = {id(weight): name for name, weight in self.moved.items()}
        by_weight: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, state = key.rpartition("/")
            by_weight.setdefault(name, {})[state] = tensor
        order = [(weight, group) for group in self.optimizer.param_groups for weight in group["params"]]
        packed: dict[str, Any] = self.optimizer.state_dict()
        packed["state"] = {
            number: saved.state_of(by_weight[names[id(weight)]], group, weight.device)
            for number, (weight, group) in enumerate(order)
            if names[id(weight)] in by_weight
        }
        self.optimizer.load_state_dict(packed)
        library.put_into_pages(self.optimizer)
        of_groups = {key: value for key, value in tensors.items() if key.startswith("@")}
        saved.load_numbers(self.optimizer.param_groups, of_groups)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let weights that move for the first time, after others, begin with a momentum of 0, which is as if with none.

    torch's fused SGD (2.13) takes the momentum of all weights of a group that move, or of none.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        moving = [weight for weight in group["params"] if weight.grad is not None] if group["momentum"] else []
        new = [weight for weight in moving if optimizer.state[weight].get("momentum_buffer") is None]
        for weight in new if len(new) < len(moving) else ():
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def build_optimizer(
    weights: dict[str, Tensor],
    settings: OptimizerSettings,
    undecayed: Collection[str] = (),
    extras: Mapping[str, Tensor] | None = None,
    tables: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer `settings.name`; weight decay on tensors of two or more dimensions that are not `undecayed`.

    extras: by name what makes a bfloat16 weight a float32 one. tables: names of embeddings and the head, which some
    optimizers do not move as matrices.
    """
    library_kind = library.KINDS.get(settings.name)
    tells_matrices = library_kind is not None and library_kind.tells_matrices
    sorts: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, weight in weights.items():
        is_matrix = tells_matrices and weight.dim() == 2 and name not in tables
        sorts.setdefault((is_matrix, weight.dim() >= 2 and name not in undecayed), []).append(weight)
    groups: list[dict[str, Any]] = [
        {"params": sorts[sort], "weight_decay": settings.weight_decay if sort[1] else 0.0, "is_matrix": sort[0]}
        for sort in sorted(sorts, reverse=True)
    ] or [{"params": [], "weight_decay": 0.0, "is_matrix": False}]  # a stage in which nothing trains
    if library_kind is not None:
        return library_kind.build(groups, settings)
    for group in groups:
        del group["is_matrix"]
    kind = getattr(torch.optim, settings.name)
    arguments = ARGUMENTS[settings.name](settings)
    if settings.state != "full":
        bits = {weights[name]: extra for name, extra in (extras or {}).items()}
        return CompactAdamW(groups, bits, is_8bit=settings.state == "8bit", lr=settings.lr, **arguments)
    if settings.name in FUSED and all(weight.dtype != torch.float64 for weight in weights.values()):
        arguments["fused"] = True
    return kind(groups, lr=settings.lr, **arguments)


def _adam(settings: OptimizerSettings) -> dict[str, object]:
    return {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _rmsprop(settings: OptimizerSettings) -> dict[str, object]:
    return {"momentum": settings.momentum or 0.0, "eps": settings.eps}


ARGUMENTS: dict[str, Callable[[OptimizerSettings], dict[str, object]]] = {
    "AdamW": _adam,
    "Adam": _adam,
    "NAdam": _adam,
    "RAdam": _adam,
    "SGD": lambda settings: {"momentum": settings.momentum or 0.0},
    "RMSprop": _rmsprop,
    "Adagrad": lambda settings: {"eps": settings.eps},
    "Adafactor": lambda settings: {},
}
