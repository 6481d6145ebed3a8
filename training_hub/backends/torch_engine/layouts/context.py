"""Context parallelism: the tokens of one pack on several ranks, each with the keys and values of all.

A rank has two pieces of a pack, one from its front and one from its end, since the later a token stands the more it
looks back at. Everything but attention goes token by token. For attention keys and values are gathered, and in the
backward pass their gradients are added up where they came from.
"""

# T tokens of a pack, L of them on this rank, N positions of this rank whose next token is trained
# B rows (one), Q query heads, K key-value heads, D width of a query head, E width of a value head

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from training_hub.backends.torch_engine.attention import documents_attention, late_attention, training_mask
from training_hub.backends.torch_engine.fused.swap import OURS
from training_hub.backends.torch_engine.layouts.exchanges import gather_single, scatter_single
from training_hub.backends.torch_engine.preflight import ROUGH, evaluating, relative_difference
from training_hub.backends.torch_engine.tensors import PackTensors, put, to_device
from training_hub.data.packing import pack
from training_hub.errors import RecipeError
from training_hub.types import Origin, Pack, Sample

CONTEXT = "training_hub_context"
"""The name by which transformers knows attention over a pack that lies on several ranks."""

PIECES = 2

LENGTHS_COMPARED = (29, 7, 13)

SAME_LOSS = {torch.float64: 1e-9, torch.float32: 1e-5}
"""How far two ways to add up the same loss may lie apart, relative to it; ROUGH for 16-bit numbers."""

DEGREE = "parallelism.context_parallel_degree"

STATEFUL = ("linear", "mamba", "conv", "recurrent", "ssm")
"""Words in the names of kinds of layers that hand a state from token to token."""


@dataclass(frozen=True)
class Share:
    """The tokens of a pack that this rank has.

    pieces: where each of its pieces begins and ends in the pack, in the order in which they lie here. lengths: tokens
    of each document of the pack. order [T] int64: where each token of the pack lies among the gathered ones.
    """

    mesh: DeviceMesh
    pieces: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    order: Tensor


@dataclass(frozen=True)
class PartTensors(PackTensors):
    """A rank's share of a pack: ids, positions and weights [1, L] are those of its tokens, rows [N] are counted here.

    next_ids and next_weights [N]: the tokens that follow, wherever they lie. trained: where in the pack they stand.
    """

    share: Share | None = None
    next_ids: Tensor | None = None
    next_weights: Tensor | None = None
    trained: np.ndarray | None = None

    @property
    def targets(self) -> Tensor:
        """[N] int64: the token that follows each of `rows`."""
        assert self.next_ids is not None
        return self.next_ids

    @property
    def target_weights(self) -> Tensor:
        """[N] float32: the weight of each of `targets`."""
        assert self.next_weights is not None
        return self.next_weights

    def places(self) -> np.ndarray:
        """[N]: where in the pack on the host each of `rows` stands."""
        assert self.trained is not None
        return self.trained

    def whole(self) -> PackTensors:
        """All of the pack on the host."""
        assert self.on_host is not None
        return to_device(self.on_host, self.ids.device)

    def of_trained(self, whole_Mx: Tensor) -> Tensor:
        """[N, ...]: what belongs to `rows`, of what belongs to all trained tokens of the pack on the host."""
        numbers = np.searchsorted(super().places(), self.places())
        return whole_Mx[put(numbers, whole_Mx.device)]

    def of_tokens(self, whole_Tx: Tensor) -> Tensor:
        """[L, ...]: what belongs to `ids`, of what belongs to all tokens of the pack on the host; zeros for those that
        were added to it."""
        assert self.share is not None
        added = whole_Tx.new_zeros(len(self.share.order) - len(whole_Tx), *whole_Tx.shape[1:])
        padded_Tx = torch.cat([whole_Tx, added])
        return torch.cat([padded_Tx[start:end] for start, end in self.share.pieces])

    def arguments(self, forward: Any) -> dict[str, Any]:
        """Keyword arguments for a transformers `forward`, which must hand on to attention what it does not know."""
        return {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False, "context_share": self.share}


def register_context_attention() -> None:
    """Make CONTEXT known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(CONTEXT, context_attention)
    AttentionMaskInterface.register(CONTEXT, training_mask)


def share_of(one: Pack, mesh: DeviceMesh, device: torch.device | str) -> PartTensors:
    """This rank's share of the pack. Tokens that belong to nobody are added, so that all shares are equally long."""
    size, rank = mesh.size(), mesh.get_local_rank()
    whole = padded(one, PIECES * size)
    length = len(whole.ids) // (PIECES * size)
    numbers = [[one, PIECES * size - 1 - one] for one in range(size)]
    places = np.concatenate([np.arange(part * length, (part + 1) * length) for two in numbers for part in two])
    pieces = tuple((part * length, (part + 1) * length) for part in numbers[rank])
    mine = np.concatenate([np.arange(start, end) for start, end in pieces])
    tensors = to_device(whole, device)
    following = np.append(whole.weights[1:], np.float32(0))[mine]
    rows = np.flatnonzero(following)
    trained = mine[rows]
    order = put(np.argsort(places, kind="stable"), device)
    here, after = put(mine, device), put(trained + 1, device)
    return PartTensors(
        ids=tensors.ids[:, here],
        positions=tensors.positions[:, here],
        weights=tensors.weights[:, here],
        lengths=tensors.lengths,
        cu_seqlens=tensors.cu_seqlens,
        rows=put(rows, device),
        on_host=one,
        share=Share(mesh, pieces, tensors.lengths, order),
        next_ids=tensors.ids[0, after],
        next_weights=tensors.weights[0, after],
        trained=trained,
    )


@torch.no_grad()
def refuse_other_numbers(
    model: Any, objective: Any, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise RecipeError where a small pack on the ranks of the mesh has another loss than the same pack on one.

    dtype: what the model computes in.
    """
    one = made_up_pack(model)
    with evaluating(model):
        alone = objective(model, to_device(one, device)).total
        together = objective(model, share_of(one, mesh, device)).total
    dist.all_reduce(together, group=mesh.get_group())
    difference = relative_difference(together, alone)
    limit = SAME_LOSS.get(dtype, ROUGH)
    if not difference <= limit:
        raise RecipeError(
            f"{DEGREE}: {type(model).__name__} finds another loss where a pack lies on {mesh.size()} processes (off by "
            f"{difference:.1e}, allowed {limit:.0e}): it looks at other tokens outside of attention. Write 1."
        )


def made_up_pack(model: Any) -> Pack:
    """A few short samples of random tokens of this model's, all trained."""
    vocabulary, random = model.config.get_text_config().vocab_size, np.random.default_rng(0)
    weights = [np.append(np.float32(0), np.ones(length - 1, np.float32)) for length in LENGTHS_COMPARED]
    ids = [random.integers(0, vocabulary, length).astype(np.int32) for length in LENGTHS_COMPARED]
    samples = [Sample(*two, Origin("made up", 1)) for two in zip(ids, weights, strict=True)]
    return pack(samples, range(len(samples)))


def padded(one: Pack, multiple: int) -> Pack:
    """The pack with a document of untrained tokens behind it, where its length is no multiple of `multiple`."""
    more = -len(one.ids) % multiple
    if not more:
        return one
    return replace(
        one,
        ids=np.concatenate([one.ids, np.zeros(more, one.ids.dtype)]),
        positions=np.concatenate([one.positions, np.arange(more, dtype=one.positions.dtype)]),
        weights=np.concatenate([one.weights, np.zeros(more, one.weights.dtype)]),
        boundaries=np.append(one.boundaries, len(one.ids) + more).astype(one.boundaries.dtype),
        samples=np.append(one.samples, -1),
    )


def context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    context_share: Share | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a pack on several ranks: [1, L, Q, E] for the tokens of this one.

    From query [1, Q, L, D], key [1, K, L, D], value [1, K, L, E]. Without a share the tokens are all here.
    """
    if context_share is None:
        return documents_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    width = key.shape[-1]
    gathered = _gathered(torch.cat([key, value], -1), context_share)
    said = []
    here = 0
    for start, end in context_share.pieces:
        for keys_from, first, last in seen(context_share.lengths, start, end):
            asking = query[:, :, here + first - start : here + last - start]
            known = gathered[:, :, keys_from:last]
            said.append(
                late_attention(module, asking, known[..., :width], known[..., width:], scaling, dropout, kwargs)
            )
        here += end - start
    return torch.cat(said, 1), None


def seen(lengths: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """For each document that has tokens in `start` to `end`: where it begins, and the first and last of these (the
    last is beyond them)."""
    at = 0
    for length in lengths:
        first, last = max(at, start), min(at + length, end)
        if first < last:
            yield at, first, last
        at += length


def _gathered(part_BKLx: Tensor, share: Share) -> Tensor:
    """[1, K, T, x] in the order of the pack, from what each rank has of it."""
    gathered: Tensor = _Gather.apply(part_BKLx, share.mesh.get_group(), share.order)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_BKLx: Tensor, group: dist.ProcessGroup, order: Tensor) -> Tensor:
        ctx.group, ctx.order = group, order
        part_LKx = part_BKLx[0].transpose(0, 1).contiguous()
        whole_TKx = part_LKx.new_empty(len(order), *part_LKx.shape[1:])
        gather_single(whole_TKx, part_LKx, group=group)
        return whole_TKx.index_select(0, order).transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient_TKx = upstream[0][0].transpose(0, 1)
        lying_TKx = torch.empty_like(gradient_TKx, memory_format=torch.contiguous_format)
        lying_TKx.index_copy_(0, ctx.order, gradient_TKx)
        part_LKx = lying_TKx.new_empty(len(lying_TKx) // ctx.group.size(), *lying_TKx.shape[1:])
        scatter_single(part_LKx, lying_TKx, group=ctx.group)
        return part_LKx.transpose(0, 1)[None], None, None


def context_problems(model: Any, degree: int) -> list[str]:
    """Why the tokens of a pack cannot lie on `degree` ranks under this model, which may lie on the meta device."""
    kind, config = type(model).__name__, model.config.get_text_config()
    kinds = sorted(
        one for one in set(getattr(config, "layer_types", None) or ()) if any(word in one for word in STATEFUL)
    )
    if kinds:
        return [
            f"{DEGREE}: {degree}, but {kind} has layers that hand a state from token to token ({kinds[0]}). Write 1."
        ]
    if getattr(config, "attention_chunk_size", None):
        return [
            f"{DEGREE}: {degree}, but {kind} attends in chunks, which is told by a mask of the whole pack. Write 1."
        ]
    parameters = inspect.signature(model.get_decoder().forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return [f"{DEGREE}: {degree}, but {kind} does not hand on to attention which tokens a process has. Write 1."]
    return []


def spread_tokens(model: Any) -> None:
    """Let the model attend over packs whose tokens lie on several ranks, in place.

    Raises RecipeError where it attends by functions of its own.
    """
    register_context_attention()
    own = model.config._attn_implementation
    if own.startswith(OURS):
        model.set_attn_implementation(CONTEXT)
    if model.config._attn_implementation != CONTEXT:
        raise RecipeError(f"{DEGREE}: {type(model).__name__} can only attend by its own function ({own}). Write 1.")
