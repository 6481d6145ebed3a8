"""Which weights are cut: found by what a module is and where it stands, never by the path or the name of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from training_hub.backends.torch_engine.layouts.pieces import Cut, cut_of, local_of, whole_cut
from training_hub.errors import RecipeError

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NAMES_SHOWN = 40

# Weights that hold several projections one after another: leaf name of the module or parameter, and how many parts.
HALVES = ("gate_up_proj",)
QUERY_KEY_VALUE = ("qkv_proj", "c_attn")
# Interleaved by head or by row, so that no slice of rows is one projection.
INTERLEAVED = ("query_key_value", "Wqkv")


@dataclass(frozen=True)
class Target:
    """A weight, or the rows of a fused one, as matrices [..., N, M] with N >= M.

    name: of the parameter, with what part of it behind where it is cut. start, length: the slice of its dimension
    `axis`, all of it for length 0. is_wide: the parameter's matrices are the transposes of these.
    """

    name: str
    parameter: nn.Parameter
    parameter_name: str
    is_wide: bool
    axis: int = 0
    start: int = 0
    length: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """Of a tensor in the shape of the parameter, the part that is this target, longer side first."""
        part = tensor.narrow(self.axis, self.start, self.length) if self.length else tensor
        return part.mT if self.is_wide else part

    @property
    def cut(self) -> Cut:
        """Where this target lies in the parameter."""
        whole = whole_cut(self.parameter.shape)
        if not self.length:
            return whole
        sizes = (*whole.sizes[: self.axis], self.length, *whole.sizes[self.axis + 1 :])
        return Cut(whole.shape, tuple(self.start * (axis == self.axis) for axis in range(len(sizes))), sizes)

    @property
    def short_side(self) -> int:
        return min(self.cut.sizes[-2:])

    def add(self, tensor: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left [..., N, r] right [..., r, M] to this target's part of `tensor`, in place.

        Of a tensor that is divided over processes each adds what falls on its piece.
        """
        if isinstance(tensor, DTensor):
            piece = local_of(tensor)
            change = torch.zeros(tensor.shape, dtype=tensor.dtype, device=left.device)
            self.add(change, left, right)
            piece.add_(change[cut_of(tensor).slices].to(piece.device))
            return
        part = tensor.narrow(self.axis, self.start, self.length) if self.length else tensor
        first, second = (right.mT, left.mT) if self.is_wide else (left, right)
        _ = part.addmm_(first, second) if part.dim() == 2 else part.baddbmm_(first, second)


def find_targets(
    model: nn.Module, patterns: Sequence[str] | None = None, *, splits_fused: bool = False
) -> list[Target]:
    """The weights to cut, in the order of the model.

    patterns: parts of parameter names, of which one must occur; without them the weights of all linear layers inside
    the blocks and of experts. splits_fused: each projection of a fused weight is cut by itself.
    Raises RecipeError where nothing matches, or a pattern matches nothing, listing the names that exist.
    """
    blocks = _prefixes_of_blocks(model)
    candidates = list(_matrices(model))
    if patterns is None:
        chosen = [one for one in candidates if one.in_block(blocks) and not one.is_router]
    else:
        _refuse_idle(patterns, [one.name for one in candidates])
        chosen = [one for one in candidates if any(pattern in one.name for pattern in patterns)]
    if not chosen:
        raise RecipeError(
            f"osft.targets: the model has no linear layer inside its blocks. {_existing([c.name for c in candidates])}"
        )
    return [target for one in chosen for target in _targets_of(one, model, splits_fused)]


@dataclass(frozen=True)
class _Matrix:
    """A parameter that could be cut. out_axis: the axis of its outputs."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module
    out_axis: int
    is_router: bool

    def in_block(self, blocks: Sequence[str]) -> bool:
        return not isinstance(self.owner, nn.Embedding) and self.name.startswith(tuple(blocks))


def _prefixes_of_blocks(model: nn.Module) -> list[str]:
    """What the names of parameters in repeated layers begin with: those of every list of modules."""
    return [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)] or ["\0"]


def _matrices(model: nn.Module) -> Iterator[_Matrix]:
    experts = _expert_count(model)
    for name, parameter in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        is_weight = parameter.dim() == 2 and leaf == "weight" and isinstance(owner, (nn.Linear, Conv1D, nn.Embedding))
        is_experts = parameter.dim() == 3 and parameter.shape[0] == experts and not isinstance(owner, nn.Conv1d)
        if (
            not parameter.is_floating_point()
            or min(parameter.shape[-2:], default=0) < 2
            or not (is_weight or is_experts)
        ):
            continue
        is_transposed = isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False)
        out_axis = parameter.dim() - (1 if is_transposed else 2)
        is_router = is_weight and experts is not None and parameter.shape[out_axis] == experts
        yield _Matrix(name, parameter, owner, out_axis, is_router)


def _expert_count(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((getattr(text, name) for name in EXPERT_COUNTS if getattr(text, name, None)), None)


def _refuse_idle(patterns: Sequence[str], names: Sequence[str]) -> None:
    idle = [pattern for pattern in patterns if not any(pattern in name for name in names)]
    if idle or not patterns:
        found = ", ".join(repr(pattern) for pattern in idle) or "an empty list"
        raise RecipeError(
            f"osft.targets (target_patterns): {found} occurs in no weight that can be cut. {_existing(names)}"
        )


def _existing(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"Weights that can be cut: {', '.join(names[:NAMES_SHOWN]) or 'none'}{more}."


def _targets_of(one: _Matrix, model: nn.Module, splits_fused: bool) -> Iterator[Target]:
    lengths = _fused_lengths(one, model) if splits_fused else []
    shape = list(one.parameter.shape)
    start = 0
    for number, length in enumerate(lengths or [0]):
        if length:
            shape[one.out_axis] = length
        yield Target(
            name=f"{one.name}[{number}]" if length else one.name,
            parameter=one.parameter,
            parameter_name=one.name,
            is_wide=shape[-2] < shape[-1],
            axis=one.out_axis,
            start=start,
            length=length,
        )
        start += length


def _fused_lengths(one: _Matrix, model: nn.Module) -> list[int]:
    """How many outputs each projection of a fused weight has; [] where it is one projection."""
    parts = one.name.split(".")
    leaf = parts[-2] if parts[-1] == "weight" else parts[-1]
    rows = one.parameter.shape[one.out_axis]
    if leaf in INTERLEAVED or not getattr(one.owner, "is_concatenated", True):
        raise RecipeError(
            f"osft.split_fused: {one.name} holds its projections interleaved, so that no slice of it is one of them. "
            "Write osft.split_fused: false, which cuts it as a whole."
        )
    if leaf in HALVES:
        return [rows // 2, rows // 2]
    if leaf not in QUERY_KEY_VALUE:
        return []
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * width
    others, rest = divmod(rows - queries, 2)
    if rest or others <= 0:
        raise RecipeError(
            f"osft.split_fused: {one.name} has {rows} outputs, which is not queries ({queries}) and two equal parts. "
            "Write osft.split_fused: false."
        )
    return [queries, others, others]
