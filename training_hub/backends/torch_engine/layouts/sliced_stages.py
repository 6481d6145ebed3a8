"""Stages whose weights lie in slices: when gradients are added up into slices and over replicas in a step of many
packs, and how gradients of weights are made apart from those of activations.

FSDP2 gathers the weights of a module before its backward pass, and adds up their gradients once that of its input is
known. In an order that makes gradients of weights later, none is there by then. So each module has another backward
pass, of a single number, through the same hooks of torch: in the midst of it the gradients of its weights are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from training_hub.backends.torch_engine.as_forward import device_of
from training_hub.backends.torch_engine.layouts.cut import Layers
from training_hub.recipe.parallelism import Parallelism

SLICED = "training_hub_sliced_stages"
"""Attribute of a divided model: its SlicedStages."""

LATER = "training_hub_later"
"""Attribute of a module that gathers its own weights: `_later` as a forward pass of it."""

Parts = list[dict[str, Any]]
"""What torch keeps of a pass for gradients of weights: by groups of weights, their nodes and the gradients that come
to them."""


class SlicedStages:
    """The modules of a model in stages that gather their own weights, and what is said to them as packs pass through.

    stays_whole: whether weights and gradients stay whole from the first pack of a step to the last.
    """

    def __init__(self, model: Any, asked: Parallelism):
        self._model = model
        self._stays_whole = asked.fsdp_reshard_after_forward == "never"
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]  # inner ones last
        self._outermost: dict[FSDPModule, Any] = {model: model}
        for module in self._modules[1:]:
            for inner in _sharded(module):
                self._outermost.setdefault(inner, module)
        self._owners: dict[int, FSDPModule] = {}
        self._weights: list[nn.Parameter] = []
        for module in self._modules:
            setattr(module, LATER, MethodType(_later, module))
            register_fsdp_forward_method(cast(nn.Module, module), LATER)
        setattr(model, SLICED, self)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The whole weights, as forward has them when they are gathered, which is when autograd sees them."""
        if not self._weights:  # torch makes them once, and fills them again and again
            for module in self._modules:
                module.unshard()
                for weight in _own(module):
                    self._owners[id(weight)] = module
                    self._weights.append(weight)
                module.reshard()
        return self._weights

    @contextmanager
    def last(self, stage: int) -> Iterator[None]:
        """Within, a whole backward pass is the last of its step through this stage."""
        layers = next(module for module in self._model.modules() if isinstance(module, Layers))
        inside = [one for number in layers.route.stages.layers(stage) for one in _sharded(layers.at(number))]
        if stage in (0, len(layers.route.stages.ends) - 1):
            inside.append(self._model)
        with self._last(inside):
            yield

    def make(self, parts: Parts, make: Callable[[Parts], Any], *, is_last: bool) -> None:
        """Let `make` make the gradients of weights from the parts, layer by layer, while its weights are whole, and
        add them up as after a backward pass. The parts are of weights among `weights`."""
        owners = [[self._owners[id(node.variable)] for node in part["params"]] for part in parts]
        outermost = [self._outermost[some[0]] for some in owners]
        for module in (self._model, *reversed(self._modules[1:])):
            numbers = [number for number, one in enumerate(outermost) if one is module]
            if numbers:
                inner = [one for number in numbers for one in owners[number] if one is not module]
                with self._last([module, *inner]) if is_last else nullcontext():
                    self._pass(module, inner, [parts[number] for number in numbers], make)

    def _pass(self, module: Any, inner: Sequence[FSDPModule], parts: Parts, make: Callable[[Parts], Any]) -> None:
        def work() -> None:
            for one in inner:
                one.unshard()  # at the end of a backward pass torch adds up what there is in any module
            make(parts)

        number = torch.zeros((), device=device_of(self._model), requires_grad=True)
        module.set_reshard_after_forward(False, recurse=False)  # the backward pass follows at once
        getattr(module, LATER)(number, work).backward()
        module.set_reshard_after_forward(not self._stays_whole and module is not self._model, recurse=False)

    @contextmanager
    def _last(self, modules: Sequence[FSDPModule]) -> Iterator[None]:
        self._say(modules, is_last=True)
        try:
            yield
        finally:
            self._say(modules, is_last=False)

    def _say(self, modules: Sequence[FSDPModule], *, is_last: bool) -> None:
        for module in modules:
            module.set_requires_all_reduce(is_last, recurse=False)
            if self._stays_whole:
                module.set_requires_gradient_sync(is_last, recurse=False)
                module.set_reshard_after_backward(is_last, recurse=False)


def sliced_stages_of(model: Any) -> SlicedStages | None:
    """What is known of a model in stages whose weights lie in slices; None of any other."""
    found: SlicedStages | None = getattr(model, SLICED, None)
    return found


def _sharded(module: Any) -> Iterator[Any]:
    """Those in a module, and itself, that gather their own weights."""
    return (one for one in module.modules() if isinstance(one, FSDPModule))


def _own(module: Any) -> Iterator[nn.Parameter]:
    """The weights in a module, but for those of modules in it that gather theirs themselves."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)


def _later(module: nn.Module, number: Tensor, work: Callable[[], None]) -> Tensor:
    """The number. Its backward pass does the work."""
    passed: Tensor = _Work.apply(number, work)
    return passed


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, work: Callable[[], None]) -> Tensor:
        ctx.work = work
        return number.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.work()
        return upstream[0], None
