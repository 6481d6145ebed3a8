"""A module exchanged for one of a subclass of its own class, which shares all that it holds; only `forward` is ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class OnKernels:
    """Marks a module whose forward is ours. A copy or pickle of it is a module of the library's class again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return made, (type(self).__bases__[1], self.__dict__)


def made(kind: type, contents: dict[str, Any]) -> nn.Module:
    """A module of class `kind` that holds `contents`."""
    module: nn.Module = object.__new__(kind)
    object.__setattr__(module, "__dict__", contents)
    return module


@cache
def subclass(own: Any, make: Callable[[Any], Forward]) -> type:
    """The subclass of `own` whose forward is `make(own)`; its `made_by` is the name of `make`."""
    return type(own.__name__, (OnKernels, own), {"forward": make(own), "made_by": make.__name__})


def exchange(model: nn.Module, name: str, module: nn.Module, make: Callable[[Any], Forward]) -> None:
    """Let the module of this name run the forward that `make` makes for its class, in place."""
    own: Any = type(module)
    model.set_submodule(name, made(subclass(own, make), module.__dict__))


def runs(module: nn.Module, make: Callable[[Any], Forward]) -> bool:
    """Whether this module runs the forward that `make` made for its class."""
    return getattr(type(module), "made_by", "") == make.__name__ and "forward" not in vars(module)
