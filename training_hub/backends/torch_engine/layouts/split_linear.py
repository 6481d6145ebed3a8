"""Linear layers split over ranks: each multiplies with its rows or columns of the weight, as plain tensors.

Weights become torch's DTensors under the names they had. Where tokens enter split products and sums leave them is said
from outside, once for all layers that read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from training_hub.backends.torch_engine.fused.exchange import Forward
from training_hub.backends.torch_engine.fused.low_rank import ACROSS, ADAPTER
from training_hub.backends.torch_engine.fused.wanted import wanted
from training_hub.backends.torch_engine.layouts import exchanges
from training_hub.backends.torch_engine.layouts.exchanges import WIDTH
from training_hub.backends.torch_engine.layouts.shared import exchange, locally, own_part
from training_hub.backends.torch_engine.layouts.tokens import Entered, Tokens
from training_hub.backends.torch_engine.loading.packing import Packing
from training_hub.backends.torch_engine.loading.quantization import OWN, PACKED, frozen_product

ROUNDS = "activation_fake_quantizer"
"""Attribute of torchao's layers that round their inputs: what does."""


@dataclass(frozen=True)
class Style:
    """How a linear layer is split. is_by_rows: its inputs are, so that ranks find summands; else its outputs.

    is_apart: it stands among products that are whole, gets whole inputs and gives whole outputs.
    """

    is_by_rows: bool
    is_apart: bool = False


STYLES: Mapping[str, Style] = {
    "colwise": Style(is_by_rows=False),
    "rowwise": Style(is_by_rows=True),
    "colwise_gather_output": Style(is_by_rows=False, is_apart=True),
    "rowwise_split_input": Style(is_by_rows=True, is_apart=True),
}
"""By transformers' names."""


def split_linear(model: nn.Module, name: str, style: Style, tokens: Tokens, *, enters: bool) -> None:
    """Split the layer of this name, in place. enters: whether tokens enter split products here, and not before it."""
    layer: Any = model.get_submodule(name)
    mesh, divide = tokens.mesh, _divide_bytes if hasattr(layer, PACKED) else _divide
    divide(layer, "weight", mesh, 1 if style.is_by_rows else 0)
    if layer.bias is not None and not style.is_by_rows:
        _divide(layer, "bias", mesh, 0)
    run_split(model, name, style, tokens, enters=enters)


def run_split(model: nn.Module, name: str, style: Style, tokens: Tokens, *, enters: bool) -> None:
    """Let the layer of this name, whose weights are a rank's part, multiply as one of several, in place."""
    layer, mesh = model.get_submodule(name), tokens.mesh
    exchange(model, name, layer, _summand if style.is_by_rows else _columns)
    split: Any = model.get_submodule(name)
    if style.is_by_rows and style.is_apart:
        split.register_forward_pre_hook(lambda module, given: (exchanges.parted(given[0], mesh, WIDTH),))
    if not style.is_by_rows and enters:
        split.register_forward_pre_hook(lambda module, given: (exchanges.entering(given[0], mesh),))
    if style.is_by_rows:
        split.register_forward_hook(_ending(tokens))
    elif style.is_apart:
        split.register_forward_hook(lambda module, given, output: exchanges.joined(output, mesh, WIDTH))


def split_lengths(layer: Any, style: Style, mesh: DeviceMesh) -> None:
    """Split what DoRA has of a layer that is split so, in place: a length for each output, of weights of all inputs."""
    setattr(layer, ACROSS, partial(exchanges.leaving, mesh=mesh) if style.is_by_rows else None)
    if not style.is_by_rows:
        _divide(layer.lora_magnitude_vector[ADAPTER], "weight", mesh, 0)


def keep_slice(model: nn.Module, name: str) -> None:
    """Let a layer that is whole on each rank keep no more of the tokens that it is given than it must, in place."""
    exchange(model, name, model.get_submodule(name), _columns)


def _divide(layer: nn.Module, key: str, mesh: DeviceMesh, dim: int) -> None:
    weight = layer.get_parameter(key)
    split = distribute_tensor(weight.detach(), mesh, [Shard(dim)], src_data_rank=None)
    layer.register_parameter(key, nn.Parameter(split, requires_grad=weight.requires_grad))


def _divide_bytes(layer: Any, key: str, mesh: DeviceMesh, dim: int) -> None:
    """The same of a quantised weight, which may be without contents: its numbers stay what they are, in blocks that lie
    in one rank each."""
    place, among = mesh.get_local_rank(), mesh.size()

    def own(packed: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
        return packing.laid_out(packed, dim), packing.part(dim, place, among)

    laid, packing = own(layer.get_parameter(key).detach(), getattr(layer, PACKED))
    split = DTensor.from_local(laid.chunk(among, dim)[place].clone(), mesh, [Shard(dim)], run_check=False)
    layer.register_parameter(key, nn.Parameter(split, requires_grad=False))
    setattr(layer, PACKED, packing)
    setattr(layer, OWN, own)


def _columns(own: Any) -> Forward:
    """This rank's outputs."""

    def forward(self: Any, x: Tensor) -> Tensor:
        entered, bias = Entered.of(x), self.bias
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if entered is None or not learns or own is not nn.Linear:  # others do more to weights than to multiply by them
            return _multiplied(own, self, x, bias)
        entered.expect()
        said: Tensor = _Product.apply(x, entered.kept, own_part(self.weight), _part(bias), entered)
        return said

    return forward


class _Product(torch.autograd.Function):
    """x W^T + b of tokens that were gathered, of which only this rank's slice is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, entered: Entered) -> Tensor:
        ctx.save_for_backward(kept, weight)
        ctx.entered = entered
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        kept, weight = ctx.saved_tensors
        upstream_TN = upstream[0].flatten(0, -2)
        needs_x, _, needs_weight, needs_bias, _ = wanted(ctx)
        of_x = (upstream_TN @ weight).view(*upstream[0].shape[:-1], weight.shape[1]) if needs_x else None
        of_weight = upstream_TN.T @ ctx.entered.again(kept).flatten(0, -2) if needs_weight else None
        return of_x, None, of_weight, upstream_TN.sum(0) if needs_bias else None, None


def _summand(own: Any) -> Forward:
    """This rank's summand of all outputs, without the bias, which is added once."""

    def forward(self: Any, x: Tensor) -> Tensor:
        rounds, weight = getattr(self, ROUNDS, None), self.weight
        if rounds is None or not isinstance(weight, DTensor):
            return _multiplied(own, self, x, None)
        return _multiplied(own, self, x, None, **{ROUNDS: partial(_rounded, rounds, mesh=weight.device_mesh)})

    return forward


def _rounded(rounds: nn.Module, x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's inputs, rounded as all inputs of a token are together: the least and the largest of these are beside
    them when the library looks for their scale."""
    with torch.no_grad():
        least, largest = x.aminmax(dim=WIDTH, keepdim=True)
        ends = exchanges.least(torch.cat([least, -largest], WIDTH), mesh)
    beside = torch.cat([x, ends[..., :1], -ends[..., 1:]], WIDTH)
    rounded: Tensor = rounds(beside)
    return rounded[..., : x.shape[WIDTH]]


def _multiplied(own: Any, layer: Any, x: Tensor, bias: Tensor | None, **changes: Any) -> Tensor:
    """What the library's class `own` makes of x by this rank's part of the weight, and the bias, if any. changes:
    attributes that are others for the part."""
    if hasattr(layer, PACKED):
        product = frozen_product(x, layer)
        return product if bias is None else product + own_part(bias)
    if own is nn.Linear:  # spelled out, so that a compiler can follow
        return nn.functional.linear(x, own_part(layer.weight), _part(bias))
    part = locally(own, layer, **changes)
    part._parameters["bias"] = _part(bias)
    said: Tensor = own.forward(part, x)
    return said


def _part(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else own_part(bias)


def _ending(tokens: Tokens) -> Callable[..., Tensor]:
    def end(module: Any, given: Any, summand: Tensor) -> Tensor:
        total = tokens.leave(summand)
        return total if module.bias is None else total + module.bias

    return end
