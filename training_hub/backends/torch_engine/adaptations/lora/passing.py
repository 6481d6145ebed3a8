"""How far PEFT is through the weights of a model, from which some adapters begin: it goes through them in their order.

It decomposes each matrix as it puts an adapter beside it, which takes minutes of a model of some size, and has no place
to ask from within. But torch tells of every function that is called with a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training_hub.backends.torch_engine.loading.on_demand import BLIND
from training_hub.types import Console


class _Passing(TorchFunctionMode):
    """Within, `advance` is told of weights that were passed by when something is computed with a later one."""

    def __init__(self, model: nn.Module, advance: Callable[[float], None]):
        super().__init__()
        self._places = {_address(one): place for place, one in enumerate(model.parameters())}
        self._advance = advance
        self._passed = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if arguments and function not in BLIND:
            self.reach(self._places.get(_address(arguments[0]), 0))
        return function(*arguments, **(options or {}))

    def reach(self, place: int) -> None:
        """Tell of the weights before this place that have not been told of."""
        if place > self._passed:
            self._advance(place - self._passed)
            self._passed = place


def _address(one: Any) -> int | None:
    """Where the numbers of a tensor lie; None of one that is made of others, or of shapes alone."""
    is_plain = isinstance(one, Tensor) and not hasattr(one, "__tensor_flatten__") and one.layout is torch.strided
    return one.data_ptr() if is_plain and not one.is_meta else None


@contextmanager
def passing(model: nn.Module, console: Console | None) -> Iterator[None]:
    """Within it the console, where there is one, shows how many of the model's weights have been passed by."""
    if console is None:
        yield
        return
    total = len(list(model.parameters()))
    with console.progress("putting adapters beside weights", total, "weights") as advance:
        through = _Passing(model, advance)
        with through:
            yield
        through.reach(total)
