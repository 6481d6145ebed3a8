"""Weights of a model without contents, for those who make something of them: each is read when it is computed with, by
one process for all, and let go before the next.

PEFT's DoRA takes norms of rows, PiSSA a part out of each matrix, others look at neither. Which do what is not known
here: torch tells of every function that is called with a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training_hub.backends.torch_engine.layouts.pieces import Cut, cut_of, local_of
from training_hub.backends.torch_engine.loading.blank import has_numbers, plain_name
from training_hub.backends.torch_engine.parallel import ALONE, Group
from training_hub.errors import RecipeError

DATA = "data"
PROPERTIES = (DATA, "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized",
              "is_sparse", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape")  # fmt: skip
METHODS = ("__len__", "data_ptr", "detach", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
           "is_floating_point", "is_pinned", "nelement", "numel", "requires_grad_", "size", "stride")  # fmt: skip

BLIND = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in PROPERTIES),
        *(getattr(Tensor, name) for name in METHODS),
        *(getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")),
        *(torch.is_complex, torch.is_floating_point, torch.numel),
    ]
)
"""What torch does with a tensor without a look at its numbers."""

DECOMPOSED = frozenset([torch.linalg.svd, torch.linalg.qr, torch.linalg.eigh, torch.svd, torch.qr])
"""What takes long, and says nothing of a matrix of zeros."""


@dataclass(frozen=True)
class Changed:
    """Weights that an adaptation has put others in the place of, by the names that they have without adapters: which
    process has each, whole, in `held` till it is handed out."""

    owners: dict[str, int] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)


UNCHANGED = Changed()


class OnDemand(TorchFunctionMode):
    """Within, each weight of a model whose weights are one number each is there when something is computed with it.

    One weight is whole at a time, in one process of the group; it is dealt to the one that has read least, and the
    others compute with zeros, until all `share` what was made. All must ask for the same in the same order.

    read: the whole weight that is called so without adapters.
    """

    def __init__(self, model: nn.Module, read: Callable[[str], Tensor], group: Group = ALONE):
        super().__init__()
        self._whole, self._group = read, group
        self._names: dict[int, str] = {}
        self._copies: set[int] = set()
        self._kept: list[Tensor] = []  # so that no other tensor comes to lie where one of these was
        for name, one in model.named_parameters():
            self._know(name, one)
        self._read = [0] * group.world_size
        self._readers: dict[str, int] = {}
        self._at_hand: tuple[str, Tensor] | None = None
        self.changed = Changed()

    @property
    def looked(self) -> int:
        """How many weights were computed with."""
        return len(self._readers)

    @property
    def numbers_read(self) -> int:
        """How many numbers of those this process has read."""
        return self._read[self._group.rank]

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        own = self._name(arguments[0]) if arguments else None
        if function in BLIND:
            return function(*arguments, **options)
        if own is None:
            if function in DECOMPOSED and not arguments[0].any():
                return _of_zeros(function, arguments, options)
            return function(*self._seen(arguments), **self._seen(options))
        if function == getattr(Tensor, DATA).__set__:
            return self._put(own, *arguments)
        if function is Tensor.to and _is_so_already(*arguments, **options):
            return arguments[0]
        if function is Tensor.clone and options.get("memory_format") is torch.preserve_format:
            return self._copied(own, arguments[0])  # as copy.deepcopy does
        if _is_in_place(function):
            return self._changed_in_place(own, function, arguments, options)
        return function(*self._seen(arguments), **self._seen(options))

    def share(self, model: nn.Module) -> None:
        """Give to all processes what was made beside each weight by the one that read it, in place."""
        for name, reader in self._readers.items():
            module = model.get_submodule(name.rpartition(".")[0])
            made = [*module.parameters(), *module.buffers()]
            self._group.spread([one for one in made if not one.is_meta], source=reader)

    def _know(self, name: str, one: Tensor, *, is_copy: bool = False) -> None:
        self._names[one.data_ptr()] = name
        self._kept.append(one.detach())
        if is_copy:
            self._copies.add(one.data_ptr())

    def _name(self, one: Any) -> str | None:
        """What the weight is called that this is, or is a copy of."""
        if not isinstance(one, Tensor) or one.is_meta or one.layout is not torch.strided or any(one.stride()):
            return None
        return self._names.get(one.data_ptr())

    def _seen(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            name = self._name(given)
            return given if name is None else self._contents(name, given)
        if isinstance(given, dict):
            return {key: self._seen(one) for key, one in given.items()}
        return type(given)(map(self._seen, given)) if type(given) in (list, tuple) else given

    def _contents(self, name: str, like: Tensor) -> Tensor:
        if name not in self._readers:
            self._readers[name] = self._read.index(min(self._read))
            self._read[self._readers[name]] += like.numel()
        if self._at_hand is None or self._at_hand[0] != name:
            self._at_hand = None  # before the next is read
            whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
            if self._readers[name] == self._group.rank:
                whole.copy_(self.changed.held[name] if name in self.changed.held else self._whole(name))
            self._at_hand = (name, whole)
        return self._at_hand[1]

    def _put(self, name: str, weight: Tensor, value: Tensor) -> None:
        if self._name(value) is not None:
            return  # it is the weight itself, which may have been changed in place
        is_copy = weight.data_ptr() in self._copies
        if not has_numbers(value):
            weight.data = value
            self._know(name, value, is_copy=is_copy)
            return
        self._refuse_copy(name, weight)
        self._change(name, value)

    def _refuse_copy(self, name: str, weight: Tensor) -> None:
        if weight.data_ptr() in self._copies:
            raise RecipeError(
                f"it changes {name} in a copy of its module, and a model that is to be divided has not read that yet. "
                "Leave the module out of lora.modules_to_save, or train in one process."
            )

    def _change(self, name: str, value: Tensor) -> None:
        reader = self._readers[name]
        self._at_hand = None
        self.changed.owners[name] = reader
        if reader == self._group.rank:
            self.changed.held[name] = value.detach().to("cpu", copy=True)

    def _changed_in_place(self, name: str, function: Any, arguments: Any, options: Any) -> Tensor:
        weight: Tensor = arguments[0]
        self._refuse_copy(name, weight)
        whole = self._contents(name, weight)
        function(*self._seen(arguments), **self._seen(options))
        self._change(name, whole)
        return weight

    def _copied(self, name: str, one: Tensor) -> Tensor:
        copied = torch.zeros((), dtype=one.dtype, device=one.device).expand(one.shape)
        self._know(name, copied, is_copy=True)
        return copied


@torch.no_grad()
def hand_out(
    model: nn.Module, changed: Changed, group: Group, advance: Callable[[float], None] = lambda count: None
) -> None:
    """Give each process its pieces of the weights of a divided model that were changed, in place, weight by weight; all
    must call it. Who had them has them no more. advance: told of each weight that is there."""
    pieces = {}
    for name, one in model.named_parameters():
        if plain_name(name) in changed.owners and not one.requires_grad:
            pieces[plain_name(name)] = one
    told = group.gather({name: [*map(list, (cut_of(one).starts, cut_of(one).sizes))] for name, one in pieces.items()})
    for name, owner in changed.owners.items():
        whole = changed.held.pop(name, None)
        with group.explained(f"its piece of {name}"):
            for rank, cuts in enumerate(told):
                if whole is not None and rank != group.rank and name in cuts:
                    _send(whole[_slices(cuts[name])], rank)
            if name in pieces:
                own = local_of(pieces[name].detach())
                own.copy_(_received(own, owner) if whole is None else whole[_slices(told[group.rank][name])])
        advance(1)


def _slices(cut: list[list[int]]) -> tuple[slice, ...]:
    starts, sizes = cut
    return Cut((), tuple(starts), tuple(sizes)).slices


def _send(piece: Tensor, rank: int) -> None:
    if piece.numel():
        dist.send(piece.contiguous().view(-1).view(torch.uint8), rank)


def _received(like: Tensor, owner: int) -> Tensor:
    piece = torch.empty(like.shape, dtype=like.dtype)
    if piece.numel():
        dist.recv(piece.view(-1).view(torch.uint8), owner)
    return piece


def _is_in_place(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_")


def _is_so_already(weight: Tensor, *arguments: Any, **options: Any) -> bool:
    """Whether Tensor.to would give the weight itself."""
    one = weight.new_zeros(())
    return one.to(*arguments, **options) is one


def _of_zeros(function: Any, arguments: Any, options: Any) -> Any:
    """What the function would give of a matrix of zeros, but zeros throughout."""
    first, *rest = arguments
    found = function(first.to("meta"), *rest, **options)
    return type(found)([torch.zeros_like(one, device=first.device) for one in found])
