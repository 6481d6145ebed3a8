"""The last matrix of a language model and its loss, without ever holding the logits of a whole pack."""

# N trained positions, D width of the model, V vocabulary, R rows of one chunk, K rank of an adapter

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.fused.functions import TYPES, are_fit, problem_on
from training_hub.backends.torch_engine.fused.low_rank import LowRank, low_rank_of
from training_hub.backends.torch_engine.fused.products import (
    add_product_,
    holder_of,
    multiply,
    multiply_into_,
    product,
)
from training_hub.backends.torch_engine.fused.wanted import wanted
from training_hub.backends.torch_engine.layouts.cut import Elsewhere, Route, route_of
from training_hub.backends.torch_engine.layouts.exchanges import entering
from training_hub.backends.torch_engine.layouts.shared import Rows
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion, TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Memory of one chunk's logits. A GPU wants thousands of rows per product, and has the room."""

SMALLEST_CHUNK = 512
"""Rows. Fewer make a CPU spend its time on re-packing the weight for each product, and on adding up its gradient:
with 131,072 tokens and a width of 256, 256 rows took 11 % longer than 512, and 1,600 took 8 % less."""

MULTIPLIED = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
"""Model families whose logits are multiplied by a number, and the config field that holds it."""

DIVIDED = {
    "granite": "logits_scaling",
    "granite_swa": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoe_swa": "logits_scaling",
    "granitemoehybrid": "logits_scaling",
    "granitemoeshared": "logits_scaling",
}
"""Model families whose logits are divided by a number."""


class Losses(Protocol):
    """What is made of the logits of some trained positions, `part` of all N. Both ways give the losses [R], and turn
    the logits into the gradient of their sum.

    on_kernel_ gets them as hidden @ weight.T gives them, in_torch_ in float32, multiplied and capped; it gives the
    gradient by these, times `multiplier`.
    """

    @property
    def has_kernel(self) -> bool: ...

    def on_kernel_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor: ...

    def in_torch_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor: ...


class Criterion(Losses, Protocol):
    """The same, of logits of the whole vocabulary."""

    def of_rows(self, rows: Rows) -> Losses:
        """The same losses, on every rank, from the logits of the tokens `rows` that each has."""
        ...


@dataclass(frozen=True)
class Head:
    """logits = softcap(multiplier * (hidden @ weight.T + bias)): weight [V, D], bias [V] or None.

    softcap(z) = cap * tanh(z / cap), where the model has a `cap`. adapter: what is added to `weight`, as a product.
    rows: those of the vocabulary that weight and bias have here, where it is split over ranks. route: of a model in
    stages, in one of which the weight is; in a walk through them all processes are told what it says.
    """

    weight: Tensor
    bias: Tensor | None = None
    multiplier: float = 1.0
    cap: float | None = None
    adapter: LowRank | None = None
    rows: Rows | None = None
    route: Route | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] in float32 (float64 for a float64 model)."""
        if self.route is not None:
            here = replace(self, route=None)
            return self.route.told(1, hidden_ND, lambda: (here.logits(hidden_ND),))[0]
        low_NK, up_VK = (self.adapter.of(hidden_ND), self.adapter.up_VK) if self.adapter else (None, None)
        return _cap_(_raw_logits(hidden_ND, self.weight, self.bias, self.multiplier, low_NK, up_VK), self.cap)

    def of_tokens(self, tokens: slice) -> Head:
        """The head of these tokens alone, over the same weight."""
        if (tokens.start, tokens.stop) == (0, len(self.weight)):
            return self
        bias = None if self.bias is None else self.bias[tokens]
        adapter = None if self.adapter is None else replace(self.adapter, up_VK=self.adapter.up_VK[tokens])
        return replace(self, weight=self.weight[tokens], bias=bias, adapter=adapter)

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor, loss: TokenLoss = PLAIN) -> Tensor:
        """Sum over n of weights[n] * loss of targets[n], -log p(targets[n]) by default: as `weigh` gives it."""
        return self.weigh(hidden_ND, TokenCriterion(loss, targets_N, weights_N))[0]

    def weigh(self, hidden_ND: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """(sum of the criterion's losses: a scalar in float32; 0, with a graph, where N is 0; the losses [N]).

        Gradients of the sum reach `hidden_ND` and, unless frozen, weight, bias and adapter. They are formed in the
        forward pass, chunk by chunk, since everything they need is known there: the logits are computed once and never
        kept.
        """
        if self.route is not None:
            here = replace(self, route=None)
            total, losses_N = self.route.told(2, hidden_ND, lambda: here.weigh(hidden_ND, criterion))
            return total, losses_N.detach()
        losses: Losses = criterion
        if self.rows is not None:
            hidden_ND, losses = entering(hidden_ND, self.rows.mesh), criterion.of_rows(self.rows)
        # Ranks have chunks together, though the last ones may have fewer tokens.
        most = len(self.weight) if self.rows is None else self.rows.most
        rows = chunk_rows(most, hidden_ND.device.type)
        low_NK, up_VK = (self.adapter.of(hidden_ND), self.adapter.up_VK) if self.adapter else (None, None)
        arguments = (hidden_ND, self.weight, self.bias, low_NK, up_VK, losses)
        total, losses_N = _HeadLoss.apply(*arguments, self.multiplier, self.cap, rows, torch.is_grad_enabled())
        return total, losses_N


def find_head(model: PreTrainedModel, *, is_split: bool = False) -> Head | None:
    """The head of a transformers model, None where it is more than one matrix.

    is_split: of one that is split over ranks the part that is here; else all of it, gathered.
    """
    layer: Any = model.get_output_embeddings()
    route = route_of(model)
    if isinstance(layer, Elsewhere):
        return Head(torch.empty(0), route=route) if layer.kind is nn.Linear else None
    adapter = low_rank_of(layer)
    if route is not None and adapter is not None:
        return None  # as processes say that know no more of it than its class
    layer = layer if adapter is None else layer.base_layer
    # A subclass may compute something else (another adapter, a quantized matrix).
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    weight, bias, rows = layer.weight, layer.bias, None
    if isinstance(weight, DTensor):
        if is_split and weight.placements[0].is_shard(0):
            rows = Rows.of(weight)
        weight, bias = (_made_plain(one, rows) for one in (weight, bias))
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, _multiplier(config), cap, adapter, rows, route)


def _made_plain(tensor: Any, rows: Rows | None) -> Any:
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor() if rows is None else tensor.to_local()


def _multiplier(config: Any) -> float:
    if config.model_type in MULTIPLIED:
        return float(getattr(config, MULTIPLIED[config.model_type]))
    if config.model_type in DIVIDED:
        return 1.0 / float(getattr(config, DIVIDED[config.model_type]))
    return 1.0


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Rows whose float32 logits take about CHUNK_BYTES."""
    return max(SMALLEST_CHUNK, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))


class _HeadLoss(torch.autograd.Function):
    """The criterion's sum over the logits of a linear head, with its gradients formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        low_NK: Tensor | None,
        up_VK: Tensor | None,
        criterion: Losses,
        multiplier: float,
        cap: float | None,
        rows: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [learns and needed for needed in ctx.needs_input_grad[:5]]
        gradients = _Gradients.zeros((hidden_ND, weight_VD, bias_V, low_NK, up_VK), wanted)
        total = torch.zeros((), dtype=_exact(hidden_ND.dtype), device=hidden_ND.device)
        losses_N = total.new_empty(len(hidden_ND))
        is_plain = bias_V is None and cap is None
        is_fused = is_plain and criterion.has_kernel and are_fit(hidden_ND, weight_VD) and kernels() is not None
        # The only criterion that has a kernel there, too.
        tokens = criterion if isinstance(criterion, TokenCriterion) and is_plain and _has_triton(hidden_ND) else None
        # One place for all chunks: a new one each time would leave holes in the heap that the next does not fit into.
        chunk_RV = hidden_ND.new_empty(min(rows, len(hidden_ND)) if is_fused else 0, len(weight_VD))
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            if is_fused:
                chosen = hidden_ND[part]
                logits_grad_RV = chunk_RV[: len(chosen)]
                multiply_into_(logits_grad_RV, chosen, weight_VD.T)
                _add_low_(logits_grad_RV, low_NK, up_VK, part)
                losses_R = criterion.on_kernel_(logits_grad_RV, part, multiplier)
            elif tokens is not None:
                logits_grad_RV = product(hidden_ND[part], weight_VD.T)
                _add_low_(logits_grad_RV, low_NK, up_VK, part)
                losses_R, logits_grad_RV = tokens.on_gpu(logits_grad_RV, part, multiplier, hidden_ND.dtype)
            else:
                low_RK = None if low_NK is None else low_NK[part]
                logits_grad_RV = _raw_logits(hidden_ND[part], weight_VD, bias_V, multiplier, low_RK, up_VK)
                losses_R, logits_grad_RV = _chunk_(logits_grad_RV, criterion, part, multiplier, cap)
            total += losses_R.sum()
            losses_N[part] = losses_R
            if any(wanted):
                gradients.add(part, logits_grad_RV, hidden_ND, weight_VD, low_NK, up_VK)
            del logits_grad_RV  # before the next is made, which takes as much
        ctx.holders = (None, holder_of(weight_VD) if gradients.weight_VD is not None else None, None, None, None)
        inputs = (hidden_ND, weight_VD, bias_V, low_NK, up_VK)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients.all())
        ctx.mark_non_differentiable(losses_N)
        return total, losses_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        given = zip(ctx.saved_tensors, ctx.dtypes, ctx.holders, wanted(ctx)[:5], strict=True)
        scaled = (
            None if gradient is None or not is_wanted else _given(gradient, upstream[0], dtype, holder)
            for gradient, dtype, holder, is_wanted in given
        )
        return (*scaled, None, None, None, None, None)  # criterion and what follows it


def _given(gradient: Tensor, factor: Tensor, dtype: torch.dtype, holder: Tensor | None) -> Tensor | None:
    """gradient * factor for autograd, or None where it was added to `holder`, without rounding it to `dtype`."""
    if holder is None:
        return _times(gradient, factor, dtype)
    factor = factor.to(gradient.dtype)
    if holder.grad is None:
        holder.grad = gradient * factor
    else:
        holder.grad.addcmul_(gradient, factor)
    return None


@dataclass
class _Gradients:
    """Sums over chunks, in float32 for the weights: thousands of small terms vanish in a bfloat16 sum."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    low_NK: Tensor | None
    up_VK: Tensor | None

    @classmethod
    def zeros(cls, inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> _Gradients:
        made = (
            None if tensor is None or not asked else torch.zeros_like(tensor, dtype=dtype(tensor.dtype))
            for tensor, asked, dtype in zip(inputs, wanted, (_same, _exact, _exact, _same, _exact), strict=True)
        )
        return cls(*made)

    def all(self) -> tuple[Tensor | None, ...]:
        return self.hidden_ND, self.weight_VD, self.bias_V, self.low_NK, self.up_VK

    def add(
        self,
        part: slice,
        logits_grad_RV: Tensor,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        low_NK: Tensor | None,
        up_VK: Tensor | None,
    ) -> None:
        low = logits_grad_RV.to(hidden_ND.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[part] = multiply(low, weight_VD)
        if self.weight_VD is not None:
            add_product_(self.weight_VD, low.T, hidden_ND[part])
        if self.bias_V is not None:
            self.bias_V += logits_grad_RV.sum(0)
        if self.low_NK is not None and up_VK is not None:
            self.low_NK[part] = low @ up_VK
        if self.up_VK is not None and low_NK is not None:
            add_product_(self.up_VK, low.T, low_NK[part])


def _has_triton(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype in TYPES and problem_on(hidden.device) is None


def _chunk_(
    logits_RV: Tensor, criterion: Losses, part: slice, multiplier: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """The chunk's losses, and the gradient by hidden @ weight.T + bias, written over `logits_RV`."""
    capped_RV = _cap_(logits_RV, cap)
    slope_RV = None if cap is None else 1 - (capped_RV / cap) ** 2
    losses_R = criterion.in_torch_(capped_RV, part, multiplier)
    return losses_R, capped_RV if slope_RV is None else capped_RV.mul_(slope_RV)


def _raw_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    multiplier: float,
    low_NK: Tensor | None,
    up_VK: Tensor | None,
) -> Tensor:
    logits_NV = product(hidden_ND, weight_VD.T)
    _add_low_(logits_NV, low_NK, up_VK, slice(None))
    if bias_V is not None:
        logits_NV += bias_V
    return logits_NV if multiplier == 1.0 else logits_NV.mul_(multiplier)


def _add_low_(logits_RV: Tensor, low_NK: Tensor | None, up_VK: Tensor | None, part: slice) -> None:
    if low_NK is not None and up_VK is not None:
        add_product_(logits_RV, low_NK[part], up_VK.T)


def _cap_(logits_NV: Tensor, cap: float | None) -> Tensor:
    return logits_NV if cap is None else logits_NV.div_(cap).tanh_().mul_(cap)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor as `dtype`, without a second copy in float32, which for a large vocabulary is gigabytes."""
    return torch.mul(gradient, factor.to(gradient.dtype), out=torch.empty_like(gradient, dtype=dtype))
