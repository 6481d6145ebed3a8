"""What a forward pass keeps for its backward pass, from the shapes of a model: the objective is run on torch's "meta"
device, where tensors have shapes but no contents, and what autograd saves is added up.

Of a divided model one process's part is run; exchanges between processes change shapes there, and send nothing.
"""

# T tokens of the pack, Q query heads, K key-value heads or experts of a token, D width of a query head or the model
# E width of a value head, N tokens, P pairs of a token and an expert that it is sent to

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from training_hub.backends.torch_engine.checkpointing import MEMORY_BUDGET, NONE, checkpoint_layers, is_kept, num_layers
from training_hub.backends.torch_engine.fused.low_rank import run_adapters_fused
from training_hub.backends.torch_engine.fused.swap import has_swapped_attention, is_ours, no_mask, swap
from training_hub.backends.torch_engine.layouts.experts import experts_of
from training_hub.backends.torch_engine.layouts.shapes import resized, slice_shapes
from training_hub.backends.torch_engine.layouts.share import EVERYTHING, Share, mask_numbers, part_of
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.objectives.head import find_head
from training_hub.backends.torch_engine.tensors import PackTensors, to_device
from training_hub.types import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES_ONLY = "training_hub_shapes"


@dataclass(frozen=True)
class Ways:
    """How a model is run where it is trained.

    is_copied: attention gives out a copy of what it keeps. on_kernels: as our kernels keep it, which is less.
    is_swapped: norms, rotary positions and gated units are our kernels', whatever attention is. is_first, is_last: of a
    stage of a pipeline, whether it begins with tokens, and whether it ends with the loss.
    """

    is_copied: bool
    on_kernels: bool = False
    is_swapped: bool = False
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class Kept:
    """Bytes that forward keeps for backward, and what comes to them in the backward pass of one layer: what it forgot,
    made again, and gradients, mostly of half as much as it keeps there (tests/distributed/test_memory.py). upstream:
    of these what comes to the weights of all layers."""

    forward: int
    again: int = 0
    upstream: int = 0

    @property
    def all(self) -> int:
        """What there is at once in a layer's backward."""
        return self.forward + self.again


def kept_bytes(
    blank: PreTrainedModel, largest: Pack, ways: Ways, *, checkpointing: str = NONE, share: Share = EVERYTHING
) -> Kept:
    """What is kept of this pack. share: what one process has of the pack, and of a model that is already cut down."""
    masks = mask_numbers(largest, share) * blank.dtype.itemsize
    part = part_of(largest, share)
    if ways.on_kernels or ways.is_swapped:
        swap(blank)
    run_adapters_fused(blank)
    if share.is_sliced:
        slice_shapes(blank, share.heads)
    layers, forgets = num_layers(blank), checkpointing not in (NONE, MEMORY_BUDGET)
    everything = _kept_bytes(blank, part, ways, NONE, share) + masks * layers
    if not layers:
        return Kept(everything)
    kept = _kept_bytes(blank, part, ways, checkpointing, share) if forgets else everything
    in_layers = everything - head_gradient(blank, ways)
    halves = _halves(blank, share, forgets=forgets)
    return Kept(kept, (everything - kept + halves * in_layers // 2) // layers, in_layers // 2)


def _halves(blank: PreTrainedModel, share: Share, *, forgets: bool) -> int:
    """How many halves of what a layer keeps come to it as gradients in its backward pass, and as what is let go of
    late: of layers that exchange tokens, the frames in which torch breaks off what it makes again still hold it; a
    mixture that forgets nothing lets go of each product's rows as their gradients come."""
    if not forgets:
        return 0 if any(experts_of(blank)) else 1
    return 2 if share.is_sliced or share.experts > 1 else 1


def head_gradient(blank: PreTrainedModel, ways: Ways) -> int:
    """Bytes of the head's gradient, which the loss makes in the forward pass."""
    head = blank.get_output_embeddings()
    weight = getattr(head, "weight", None) if ways.is_last and find_head(blank) is not None else None
    if weight is None or not weight.requires_grad:
        return 0
    return int(weight.numel() * torch.promote_types(weight.dtype, torch.float32).itemsize)


def _kept_bytes(blank: PreTrainedModel, largest: Pack, ways: Ways, checkpointing: str, share: Share) -> int:
    _run_on_shapes(blank, ways, share)
    blank.train()
    saved: dict[int, Tensor] = {}
    # Without kernels of ours attention is an operation of torch, whose result `selective` keeps.
    checkpoint_layers(
        blank,
        checkpointing,
        lambda: (_Keeping(saved, with_attention=not ways.on_kernels), nullcontext()),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing),
    )
    own = {id_of(parameter) for parameter in blank.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in own:
            saved[id_of(tensor)] = tensor  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run(blank, to_device(largest, "meta"), ways)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _run(blank: Any, pack: PackTensors, ways: Ways) -> None:
    """The objective; of a stage that is not the last one what it hands on."""
    if ways.is_first and ways.is_last:
        CrossEntropy(through_head=find_head(blank) is not None)(blank, pack)
        return
    decoder = getattr(blank, blank.base_model_prefix)
    if not ways.is_first:
        table = _Received(blank.config.get_text_config().hidden_size, blank.dtype)
        decoder.set_input_embeddings(table)
    if ways.is_last:
        CrossEntropy()(blank, pack)
        return
    arguments = pack.arguments(decoder.forward)
    if is_ours(decoder) and has_swapped_attention(decoder):
        arguments["attention_mask"] = no_mask(pack.ids.device)
    decoder(**arguments)


class _Received(nn.Module):
    """What a stage is given by the one before, in the place of embeddings."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return torch.empty(*ids.shape, self.width, dtype=self.dtype, device=ids.device, requires_grad=True)


def _run_on_shapes(blank: PreTrainedModel, ways: Ways, share: Share) -> None:
    """Let the model attend, and ask its experts, without contents."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # Not known to AttentionMaskInterface: then transformers makes no mask, and asks for no contents to make one from.
    attention = _kernel_attention if ways.on_kernels else _copied_attention if ways.is_copied else _shapes_attention
    gathers = share.tokens > 1
    AttentionInterface.register(SHAPES_ONLY, partial(_gathering, attention, share.tokens) if gathers else attention)
    blank.set_attn_implementation(SHAPES_ONLY)
    if getattr(blank.config, "_experts_implementation", None) in _GROUPED:
        ALL_EXPERTS_FUNCTIONS.register(SHAPES_ONLY, partial(_experts, share))
        for module in blank.modules():
            if getattr(getattr(module, "config", None), "_experts_implementation", None) in _GROUPED:
                module.config._experts_implementation = SHAPES_ONLY


class _Keeping(TorchDispatchMode):
    """Notes what selective checkpointing keeps of a layer; on the meta device attention shows as a new tensor."""

    def __init__(self, saved: dict[int, Tensor], *, with_attention: bool):
        super().__init__()
        self._saved, self._with_attention = saved, with_attention

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = operation(*arguments, **(options or {}))
        is_attention = self._with_attention and operation is torch.ops.aten.new_empty.default
        if is_attention or is_kept(operation):
            self._saved[id_of(made)] = made
        return made


def id_of(tensor: Tensor) -> int:
    """What tensors over the same memory have in common; tensors without contents have no address."""
    return tensor.untyped_storage()._cdata


class _Attention(torch.autograd.Function):
    """The shapes of fused attention: queries, keys, values and result are kept, scores are not."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result_QTE = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result_QTE)
        return result_QTE

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _gathering(
    attention: Any, among: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    both = resized(torch.cat([key, value], -1), 2, among * key.shape[2])
    said: tuple[Tensor, None] = attention(
        module, query, both[..., : key.shape[-1]], both[..., key.shape[-1] :], mask, **kwargs
    )
    return said


def _shapes_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2), None


def _copied_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


class _KernelAttention(torch.autograd.Function):
    """The shapes of our kernel: the result is laid out as it is used, and not kept; a number per query and head is."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        ctx.save_for_backward(query, key, value, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return query.new_empty(rows, tokens, heads, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _kernel_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    return _KernelAttention.apply(query, key, value), None


_GROUPED = ("grouped_mm", SHAPES_ONLY)
"""What transformers calls the way in which it multiplies tokens with their experts, unless a model cannot."""


def _experts(share: Share, module: Any, hidden_ND: Tensor, index_NK: Tensor, shares_NK: Tensor) -> Tensor:
    """The shapes of experts that are asked by grouped products, as many pairs by each process as by any other: what
    goes into each product is kept, and what comes out of the last for the gradient of shares.

    Experts that are dealt out to processes with tokens of their own give back rows that are kept once more.
    """
    is_shared = share.heads > 1 and not share.is_sliced and share.experts == 1
    chosen_P = index_NK.flatten()[: index_NK.numel() // (share.heads if is_shared else 1)]
    given_PD, shares_P = hidden_ND[chosen_P], shares_NK.flatten()[chosen_P]
    first = module.gate_up_proj if module.has_gate else module.up_proj
    made_PE = _product(module, given_PD, first)
    made_PE = module._apply_gate(made_PE) if module.has_gate else module.act_fn(made_PE)
    said_PD = _product(module, made_PE, module.down_proj)
    if share.experts > 1:
        said_PD = resized(said_PD * shares_P[:, None], 0, len(said_PD))
    return torch.zeros_like(hidden_ND).index_add(0, chosen_P, (said_PD * shares_P[:, None]).to(hidden_ND.dtype))


def _product(module: Any, x_Px: Tensor, weights: Tensor) -> Tensor:
    return nn.functional.linear(x_Px, weights[0].T if module.is_transposed else weights[0])
