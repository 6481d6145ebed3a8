"""Compile each decoder block with torch.compile; attention, which a pack's lengths steer, runs between its parts.

The blocks of a model share their code, so that one is compiled for all. What a block computes is the library's plain
forward: our own kernels, which do by hand what compiling does, stay out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from training_hub.backends.torch_engine.attention import FUNCTIONS
from training_hub.backends.torch_engine.checkpointing import MEMORY_BUDGET, layers_of
from training_hub.errors import RecipeError
from training_hub.recipe.sections import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = "document_lengths"
LIVE = (
    "training.compile: a model that was handed over would stay compiled. Give its folder as model.path, or write false."
)


class Sealed:
    """A value that the compiler hands on without a look: code that it saw would be made anew for each other value."""

    def __init__(self, value: Any):
        self.value = value


def compile_blocks(model: PreTrainedModel) -> str:
    """Compile every decoder block when it first runs, in place; what a user should be told.

    To be called before the model is divided. Raises RecipeError where it has no blocks that are known as such.
    """
    from transformers import AttentionInterface

    blocks = layers_of(model)
    if not blocks:
        raise RecipeError(f"training.compile: the blocks of {type(model).__name__} are not known. Write false.")
    torch._dynamo.reset()  # models of former runs in this process count towards the limit of versions of one code
    for name, attend in FUNCTIONS.items():
        AttentionInterface.register(name, torch.compiler.disable(_opened(attend)))
    for block in blocks:
        block.compile()
    model.base_model.register_forward_pre_hook(_seal, with_kwargs=True)
    return f"{len(blocks)} blocks are compiled when they first run, which takes up to minutes"


@contextmanager
def budgeted(asked: Training) -> Iterator[None]:
    """Within, what is compiled keeps for its backward pass what the recipe's budget allows."""
    if asked.activation_checkpointing != MEMORY_BUDGET:
        yield
        return
    from torch._functorch import config

    with config.patch(activation_memory_budget=asked.activation_memory_budget):
        yield


def _seal(model: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {**named, LENGTHS: Sealed(named[LENGTHS])} if LENGTHS in named else named


def _opened(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_opened(*arguments: Any, **named: Any) -> Any:
        found = named.get(LENGTHS)
        return attend(*arguments, **{**named, LENGTHS: found.value} if isinstance(found, Sealed) else named)

    return attend_opened
