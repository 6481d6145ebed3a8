"""No operation of a step asks a device for numbers, for which the host of a GPU would wait; seen on a CPU, as they are
asked for. What a GPU does by other code of ours is tried there (test_cuda_step.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.backends.torch_engine.steps import CASES, assembled, gradients, update

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal")
"""Operations whose result is a number of the host's, as of item() or bool(), or as long as the numbers say."""

READING = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
"""Methods that read a CPU's memory without an operation."""


class Reads(TorchFunctionMode):
    """Notes what reads."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in READING:
            self._found.append(function.__name__)
        return function(*arguments, **(options or {}))


class Asks(TorchDispatchMode):
    """Notes what asks."""

    def __init__(self, found: list[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in arguments[1]
        )
        if name in ASKING or by_mask or (name == "repeat_interleave" and "output_size" not in (options or {})):
            self._found.append(name)
        return operation(*arguments, **(options or {}))


@contextmanager
def asked() -> Iterator[list[str]]:
    """What asks within."""
    found: list[str] = []
    with Reads(found), Asks(found):
        yield found


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_step_asks_the_device(case: str, tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    run = assembled(case, torch.device("cpu"), tiny_model_folder, chat_file, tmp_path)
    gradients(run, run.feed.batch(1, 0, 1))
    update(run)
    with asked() as before:
        gradients(run, run.feed.batch(2, 0, 1))
        run.adaptation.before_step(1e-4)
    run.updater.step(1e-4)  # optimizers count their steps in tensors of the host's own
    with asked() as after:
        run.adaptation.after_step()
    assert not before and not after


@pytest.mark.parametrize("ask", [float, bool, Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy])
def test_what_asks_for_a_number_is_noted(ask: Callable[[Tensor], Any]) -> None:
    with asked() as found:
        ask(torch.ones(()))
    assert len(found) == 1


def test_what_is_as_long_as_the_numbers_say_is_noted() -> None:
    numbers, is_wanted = torch.arange(3), torch.tensor([True, False, True])
    with asked() as found:
        numbers[is_wanted]
        numbers.nonzero()
        torch.repeat_interleave(numbers, numbers)
        torch.repeat_interleave(numbers, numbers, output_size=3)
    assert found == ["index", "nonzero", "repeat_interleave"]
