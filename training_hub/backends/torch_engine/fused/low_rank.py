"""Linear layers with a low-rank adapter beside a frozen weight, in as few products as there are.

y = x W^T + b + s (x A^T) B^T, where PEFT makes x A^T, times B^T, times s, and adds that to x W^T: four passes over a
tensor as large as y. Here the adapter's part is written first and the product with W adds itself to it, which costs
that product next to nothing. Layers that read the same x (query, key and value; gate and up) take all their A in one
product, and their parts of dx are added up by the products that make them.

DoRA (Liu et al. 2024, arXiv:2402.09353) learns the length m of each row of W apart from its direction: y = m / |V| *
x V^T + b with V = W + s B A, where no gradient goes through the length |V| (section 4.3). For B A PEFT sends the
identity through A and B, as many rows as the layer has inputs; and it asks for the name of W's class, which stops a
compiler.
"""

# T tokens, M inputs, N outputs, R ranks of all adapters that read one x

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.checkpointing import KEEPS_PRODUCTS
from training_hub.backends.torch_engine.fused import eight_bit, one_input
from training_hub.backends.torch_engine.fused.exchange import Forward, OnKernels, exchange
from training_hub.backends.torch_engine.fused.products import add_product_, is_faster, linear
from training_hub.backends.torch_engine.fused.wanted import wanted
from training_hub.backends.torch_engine.loading.quantization import dense

ADAPTER = "default"
EIGHT_BIT = "_eight_bit_linear"
"""What makes the forward of a layer that multiplies in 8-bit floating point (`swap.multiply_in_eight_bits`)."""

LAYER = "peft.tuners.lora.layer.Linear"
"""What PEFT puts in the place of a linear layer."""

DORA = "DoraLinearVariant"
"""Class of what PEFT has such a layer do for DoRA."""

ACROSS = "training_hub_across"
"""Attribute of a layer with DoRA that is split: what adds up numbers of inputs that lie on several processes; None
where outputs do."""


@dataclass(frozen=True)
class LowRank:
    """What a plain adapter adds to a layer: scale * (x @ down.T) @ up.T, with down [K, M] and up [N, K]."""

    down_KM: Tensor
    up_VK: Tensor
    scale: float

    def of(self, x_TM: Tensor) -> Tensor:
        """[T, K]: scale * x @ down.T."""
        return self.scale * (x_TM @ self.down_KM.T)


def low_rank_of(layer: Any) -> LowRank | None:
    """What the adapter of this layer adds, where that is all that it does; None for every other layer."""
    if not hasattr(layer, "base_layer") or not _is_plain(layer, layer.base_layer.weight):
        return None
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return LowRank(down, up, layer.scaling[ADAPTER])


def run_adapters_fused(model: nn.Module) -> None:
    """Exchange PEFT's linear layers with plain LoRA, or DoRA, for ours, in place; parameters and names stay."""
    for name, module in list(model.named_modules()):
        kind: Any = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" != LAYER:
            continue
        if is_dora(module):
            exchange(model, name, module, _with_lengths)
        elif isinstance(module.base_layer, nn.Linear):
            exchange(model, name, module, _forward)


def is_dora(module: Any) -> bool:
    """Whether this is a layer of PEFT's with DoRA."""
    return [type(one).__name__ for one in getattr(module, "lora_variant", {}).values()] == [DORA]


def project(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
    """What each of the layers makes of x [..., M]; those with adapters together, where all have one, and on a GPU those
    without."""
    if all(_is_plain(layer, x) for layer in layers):
        factors = [part for layer in layers for part in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)]
        bases, scales = [layer.base_layer for layer in layers], [layer.scaling[ADAPTER] for layer in layers]
        outputs: tuple[Tensor, ...] = _LowRank.apply(x, bases, scales, *factors)
        return outputs
    return one_input.project(x, layers) if one_input.pays(x, layers) else [layer(x) for layer in layers]


def _forward(own: Any) -> Forward:
    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        # A compiler puts together what it is shown in the library's own operations.
        if torch.compiler.is_compiling() or arguments or options or not _is_plain(self, x):
            return own.forward(self, x, *arguments, **options)
        return project(x, (self,))[0]

    return forward


def _with_lengths(own: Any) -> Forward:
    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        is_one = self.active_adapters == [ADAPTER] and not (self.disable_adapters or self.merged_adapters)
        if arguments or options or not is_one or self.lora_A[ADAPTER].weight.dtype != x.dtype:
            return own.forward(self, x, *arguments, **options)
        return _directed(self, x)

    return forward


def _directed(layer: Any, x: Tensor) -> Tensor:
    """What a layer with DoRA makes of x [..., M]: its adapter, and the turned weight, see x with dropout. Of one whose
    outputs lie on several processes, what this one has of them."""
    base, down, up = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    scale, dropout = layer.scaling[ADAPTER], layer.lora_dropout[ADAPTER]
    with torch.no_grad():
        added_NM = scale * (_own(up.weight) @ _own(down.weight)).to(x.dtype)
        weight_NM = _own(dense(base, x.dtype))
        length_N = _lengths(layer, (weight_NM.T if layer.fan_in_fan_out else weight_NM) + added_NM)
    turn_N = _own(layer.lora_magnitude_vector[ADAPTER].weight) / length_N.to(x.dtype)
    whole = base(x)
    dropped = dropout(x)
    again = whole if dropped is x else base(dropped)
    again = again if base.bias is None else again - _own(base.bias)
    return whole + (turn_N - 1) * again + turn_N * scale * up(down(dropped))


def _lengths(layer: Any, weight_NM: Tensor) -> Tensor:
    """[N]: the length of each row, of which other processes may have other columns."""
    across = getattr(layer, ACROSS, None)
    if across is None:
        return torch.linalg.vector_norm(weight_NM, dim=1)
    exact = torch.promote_types(weight_NM.dtype, torch.float32)
    total_N: Tensor = across(torch.linalg.vector_norm(weight_NM, dim=1, dtype=exact).square())
    return total_N.sqrt()


def _own(weight: Tensor) -> Tensor:
    """This process's part of a weight, or all of it where it is not split."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether this layer now computes x W^T + b + s (x A^T) B^T and nothing else."""
    if not (_is_ours(layer) and hasattr(layer, "lora_A")):
        return False
    if layer.disable_adapters or layer.merged_adapters or layer.active_adapters != [ADAPTER] or layer.lora_variant:
        return False
    kind = type(layer.base_layer)
    if kind is not nn.Linear and getattr(kind, "made_by", "") not in ("_linear", "_dense_forward", EIGHT_BIT):
        return False  # its product is another one, of rounded numbers
    if isinstance(layer.base_layer.weight, DTensor):
        return False  # it has a part of it, and its hooks put the parts together
    has_dropout = layer.training and not isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    is_turned = layer.fan_in_fan_out or layer.lora_bias[ADAPTER]
    return not has_dropout and not is_turned and layer.lora_A[ADAPTER].weight.dtype == x.dtype


def _is_ours(layer: Any) -> bool:
    return isinstance(layer, OnKernels)


class _LowRank(torch.autograd.Function):
    """Outputs of layers that read one x; x and x A^T are kept, once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: list[nn.Linear], scales: list[float], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        x_TM = x.reshape(-1, x.shape[-1])
        downs, ups = factors[0::2], factors[1::2]
        low_TR = x_TM @ _stacked(downs).T
        in_eight_bits = eight_bit.quantize_rows(x_TM) if any(map(_is_eight_bit, bases)) else None
        outputs = []
        for base, scale, up_NR, part in zip(bases, scales, ups, _parts(low_TR, downs), strict=True):
            if in_eight_bits is not None and _is_eight_bit(base):
                y_TN = eight_bit.multiply(in_eight_bits, base.weight, base.bias)
                y_TN.addmm_(part, up_NR.T, alpha=scale)
            else:
                y_TN = _beside(base, x_TM, scale * part, up_NR)
            outputs.append(y_TN.view(*x.shape[:-1], len(up_NR)))
        ctx.save_for_backward(x_TM, low_TR, *factors)
        ctx.bases, ctx.scales, ctx.shape = bases, scales, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TM, low_TR, *factors = ctx.saved_tensors
        downs, ups, (needs_x, _, _, *needs) = factors[0::2], factors[1::2], wanted(ctx)
        gradients = [None if g is None else g.reshape(-1, g.shape[-1]) for g in upstream]
        low_grad_TR = torch.zeros_like(low_TR) if None in gradients else torch.empty_like(low_TR)
        of_ups: list[Tensor | None] = []
        for g_TN, scale, up_NR, low, made, needs_up in zip(
            gradients, ctx.scales, ups, _parts(low_TR, downs), _parts(low_grad_TR, downs), needs[1::2], strict=True
        ):
            of_ups.append((g_TN.T @ low).mul_(scale) if g_TN is not None and needs_up else None)
            if g_TN is not None:
                made.copy_((g_TN @ up_NR).mul_(scale))
        of_x = _of_input(ctx, gradients, low_grad_TR, downs) if needs_x else None
        if not any(needs[0::2]):
            return of_x, None, None, *(g for of_up in of_ups for g in (None, of_up))
        of_down_RM = low_grad_TR.T @ x_TM
        of_factors = [g for pair in zip(_parts(of_down_RM.T, downs), of_ups, strict=True) for g in (pair[0].T, pair[1])]
        return of_x, None, None, *of_factors


def _of_input(ctx: Any, gradients: list[Tensor | None], low_grad_TR: Tensor, downs: Sequence[Tensor]) -> Tensor:
    total_TM = low_grad_TR @ _stacked(downs)
    for g_TN, base in zip(gradients, ctx.bases, strict=True):
        if g_TN is None:
            continue
        if _is_eight_bit(base):
            total_TM += eight_bit.of_input(g_TN, base.weight)
        else:
            add_product_(total_TM, g_TN, dense(base, g_TN.dtype))
    return total_TM.view(ctx.shape)


def _beside(base: Any, x_TM: Tensor, part_TK: Tensor, up_NK: Tensor) -> Tensor:
    """[T, N]: x W^T + b + part @ up^T."""
    weight = dense(base, x_TM.dtype)
    if getattr(base, KEEPS_PRODUCTS, False) or is_faster(x_TM, weight):
        return torch.addmm(linear(x_TM, weight, base.bias), part_TK, up_NK.T)
    # The smaller part is rounded first, and the sum once more.
    y_TN = part_TK @ up_NK.T if base.bias is None else torch.addmm(base.bias, part_TK, up_NK.T)
    return y_TN.addmm_(x_TM, weight.T)


def _is_eight_bit(base: Any) -> bool:
    return getattr(type(base), "made_by", "") == EIGHT_BIT


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))


def _parts(tensor: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of a tensor whose last side is R, what belongs to each adapter."""
    return tensor.split([len(down) for down in downs], -1)
