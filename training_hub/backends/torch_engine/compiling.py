"""Compile each decoder block with torch.compile. What no compiler can follow runs between its parts: attention, which a
pack's lengths steer, and experts, which are sent as many tokens as ask for them.

The blocks of a model share their code, so that one of each kind is compiled for all. What a block computes is the
library's plain forward: our own kernels, which do by hand what compiling does, stay out. Exchanges of tensors that are
split over processes are a part of what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from training_hub.backends.torch_engine.attention import FUNCTIONS
from training_hub.backends.torch_engine.checkpointing import MEMORY_BUDGET, layers_of
from training_hub.backends.torch_engine.layouts.context import CONTEXT, context_attention
from training_hub.errors import RecipeError
from training_hub.recipe.sections import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OF_A_PACK = ("document_lengths", "context_share", "max_length_q", "max_length_k")
"""Keywords by which attention is told how a pack is made up."""

VERSIONS = 64
"""How many versions of one code the compiler may make: layers of every kind run through one function of transformers',
with gradients and without, as plain modules, ours, and in slices. torch's own limit is 8."""

LIVE = (
    "training.compile: a model that was handed over would stay compiled. Give its folder as model.path, or write false."
)


class Sealed:
    """A value that the compiler hands on without a look: code that it saw would be made anew for each other value."""

    def __init__(self, value: Any):
        self.value = value


def compile_blocks(model: PreTrainedModel) -> str:
    """Compile every decoder block that is here when it first runs, in place; what a user should be told.

    To be called once the model is divided: what divides it exchanges modules, which would leave the old ones compiled.
    Raises RecipeError where it has no blocks that are known as such.
    """
    from transformers import AttentionInterface

    blocks = layers_of(model)
    if not blocks:
        raise RecipeError(f"training.compile: the blocks of {type(model).__name__} are not known. Write false.")
    torch._dynamo.reset()  # models of former runs in this process count towards the limit of versions of one code
    for name, attend in {**FUNCTIONS, CONTEXT: context_attention}.items():
        AttentionInterface.register(name, torch.compiler.disable(_opened(attend)))
    for block in blocks:
        block.compile()
    model.base_model.register_forward_pre_hook(_seal, with_kwargs=True)
    return f"{len(blocks)} blocks are compiled when they first run, which takes up to minutes"


@contextmanager
def uncompiled(model: PreTrainedModel) -> Iterator[None]:
    """Within, blocks run as they are written: for a text that grows they would be compiled for length after length."""
    if all(block._compiled_call_impl is None for block in layers_of(model)):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def budgeted(asked: Training) -> Iterator[None]:
    """Within, what is compiled keeps for its backward pass what the recipe's budget allows, and may have VERSIONS."""
    if not asked.compile:
        yield
        return
    from torch._functorch import config

    budget = asked.activation_memory_budget if asked.activation_checkpointing == MEMORY_BUDGET else None
    kept = nullcontext() if budget is None else config.patch(activation_memory_budget=budget)
    with kept, torch._dynamo.config.patch(recompile_limit=VERSIONS):
        yield


def _seal(model: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return arguments, {name: Sealed(value) if name in OF_A_PACK else value for name, value in named.items()}


def _opened(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_opened(*arguments: Any, **named: Any) -> Any:
        opened = {name: value.value if isinstance(value, Sealed) else value for name, value in named.items()}
        return attend(*arguments, **opened)

    return attend_opened
