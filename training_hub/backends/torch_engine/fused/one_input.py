"""Linear layers that read one x, whose parts of its gradient are added up by the products that make them.

By itself autograd adds what each layer sends back in a pass of its own: for query, key and value, gate and up, that is
three passes in a decoder layer, each over three tensors as large as x. A product on a GPU adds to what is there as it
writes its result. On a CPU the pass is small beside the product, and products are chosen by other means.
"""

# T tokens, K numbers in, N numbers out

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear

from training_hub.backends.torch_engine.fused.products import add_product_, add_to_gradient, holder_of
from training_hub.backends.torch_engine.fused.wanted import wanted


def pays(x: Tensor, layers: Sequence[Any]) -> bool:
    """Whether `project` is faster than the layers one by one, and all that they do."""
    return len(layers) > 1 and x.is_cuda and x.requires_grad and all(is_plain(layer) for layer in layers)


def is_plain(layer: Any) -> bool:
    """Whether this is x W^T + b with a weight of plain numbers that is whole, and nothing hangs on it."""
    kind = type(layer)
    if not (kind is nn.Linear or getattr(kind, "made_by", "") == "_linear") or "forward" in vars(layer):
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    # Pieces and rounded numbers are kinds of tensors of their own.
    return not any(hooks) and type(layer.weight) is nn.Parameter


def project(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """What each of the layers makes of x [..., K]."""
    weights = [part for layer in layers for part in (layer.weight, layer.bias)]
    outputs: tuple[Tensor, ...] = _Projections.apply(x, *weights)
    return outputs


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parts[0::2], parts[1::2]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(plain_linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_TK = x.reshape(-1, x.shape[-1])
        needs_x, *needs = wanted(ctx)
        of_x: Tensor | None = None
        of_parts: list[Tensor | None] = []
        for number, (gradient, weight) in enumerate(zip(upstream, weights, strict=True)):
            if gradient is None:
                of_parts += [None, None]
                continue
            gradient_TN = gradient.reshape(-1, len(weight))
            needs_weight, needs_bias = needs[2 * number : 2 * number + 2]
            of_parts += [
                _of_weight(gradient_TN, x_TK, weight) if needs_weight else None,
                gradient_TN.sum(0) if needs_bias else None,
            ]
            if needs_x and of_x is None:
                of_x = gradient_TN @ weight
            elif of_x is not None:
                add_product_(of_x, gradient_TN, weight)
        return (None if of_x is None else of_x.view(x.shape), *of_parts)


def _of_weight(gradient_TN: Tensor, x_TK: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a weight; None where it went straight into its float32 sum."""
    if holder_of(weight) is None:
        return gradient_TN.T @ x_TK
    add_to_gradient(weight, gradient_TN.T, x_TK)
    return None
