"""The tokens between the split products of a layer: the same on all ranks, or on each rank a slice of them.

Slices are what is called sequence parallelism: norms, residuals and routers see a slice, attention and MLPs gather all
tokens where they begin and leave a slice of their sum, which sends as much as adding up whole sums would.
Source: Korthikanti et al. 2022, arXiv:2205.05198.
"""

# B rows of a batch, T tokens, L tokens of one rank, D width of the model

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from training_hub.backends.torch_engine.layouts import exchanges
from training_hub.backends.torch_engine.layouts.exchanges import TOKENS

ENTERED = "training_hub_entered"
"""Attribute of a tensor: where it was gathered from."""

HIDDEN, POSITIONS = "hidden_states", "position_embeddings"
"""Keywords of transformers' layers."""


class Tokens:
    """How tokens lie between split products on the ranks of `mesh`, for the hooks of a model that is split over it.

    are_sliced: whether now each rank has a slice of them. Slices are equally long, with zeros behind the last token.
    """

    def __init__(self, mesh: DeviceMesh, *, are_sliced: bool):
        self.mesh, self.are_sliced = mesh, are_sliced

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block all ranks have all tokens."""
        before, self.are_sliced = self.are_sliced, False
        try:
            yield
        finally:
            self.are_sliced = before

    def enter(self, hidden: Tensor, length: int | None = None) -> Tensor:
        """[B, T, D] for products that are split. length: T, where the tokens behind the last must go."""
        if not self.are_sliced:
            return exchanges.entering(hidden, self.mesh)
        entered = exchanges.entering_joined(hidden, self.mesh, TOKENS, length)
        if not torch.compiler.is_compiling():  # the compiler says by itself what is kept for backward
            setattr(entered, ENTERED, Entered(hidden.detach(), self.mesh, entered.shape[TOKENS]))
        return entered

    def leave(self, summands: Tensor) -> Tensor:
        """What lies between products, from the summand [B, T, D] of each rank."""
        if self.are_sliced:
            return exchanges.leaving_parted(summands, self.mesh, TOKENS)
        return exchanges.leaving(summands, self.mesh)

    def join(self, hidden: Tensor, length: int | None = None) -> Tensor:
        """[B, T, D] for work that all ranks do alike."""
        return exchanges.joined(hidden, self.mesh, TOKENS, length) if self.are_sliced else hidden

    def part(self, hidden: Tensor) -> Tensor:
        """What lies between products, from [B, T, D] that is the same on all ranks."""
        return exchanges.parted(hidden, self.mesh, TOKENS) if self.are_sliced else hidden

    def passed(self, hidden: Tensor) -> Tensor:
        """[B, L, D]: this rank's slice of what lies between products, since others need not pass the same on."""
        return hidden if self.are_sliced else exchanges.parted(hidden, self.mesh, TOKENS)

    def taken(self, hidden: Tensor, length: int) -> Tensor:
        """What lies between products, from the slice that each rank was passed of `length` tokens."""
        return hidden if self.are_sliced else exchanges.joined(hidden, self.mesh, TOKENS, length)

    def of_rank(self, length: int) -> int:
        """How many of `length` tokens a slice has."""
        return -(-length // self.mesh.size())


class Entered:
    """Tokens that products have entered, which are gathered again from `kept`, this rank's slice, for the gradients of
    the weights of these products: once for all that expect it, each of which asks in the pass that makes these."""

    def __init__(self, kept: Tensor, mesh: DeviceMesh, length: int):
        self.kept, self.mesh, self.length = kept, mesh, length
        self._expected = self._asked = 0
        self._whole: Tensor | None = None

    @staticmethod
    def of(x: Tensor) -> Entered | None:
        """What is known of a tensor that `Tokens.enter` gave."""
        found: Entered | None = None if torch.compiler.is_compiling() else getattr(x, ENTERED, None)
        return found

    def expect(self) -> None:
        """One more product will ask."""
        self._expected += 1

    def again(self, kept: Tensor) -> Tensor:
        """[B, T, D], from the slice as backward has it."""
        whole = self._whole
        if whole is None:
            whole = exchanges.gathered(kept, self.mesh, TOKENS, self.length)
        self._asked += 1
        self._whole = whole if self._asked % self._expected else None
        return whole


def on_entry(module: nn.Module, change: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
    """Let `change` make of the hidden states that the module is given, and of its keyword arguments, what it gets."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (change(arguments[0], keywords), *arguments[1:]), keywords
        return arguments, {**keywords, HIDDEN: change(keywords[HIDDEN], keywords)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_exit(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let `change` make something of the hidden states that the module gives, alone or first of several."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


def num_tokens(keywords: dict[str, Any]) -> int | None:
    """T, as an attention layer is told by the rotary positions it gets; None for a module that gets none."""
    found = keywords.get(POSITIONS)
    return None if found is None else int(found[0].shape[TOKENS])
