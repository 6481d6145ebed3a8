"""OSFT as the paper and mini_trainer 0.9 write it: factors as parameters, autograd, a projection before and after.

Written for the tests alone, in the plainest way: no dense weight is ever trained, no gradient is converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """x -> x W^T + b with W = U_h S_h V_h + U S V, of which U, S and V train."""

    def __init__(self, linear: nn.Linear, kept: int):
        super().__init__()
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.u_high, self.s_high, self.v_high = u[:, :kept], s[:kept], v[:kept]
        self.u, self.s, self.v = (nn.Parameter(part.clone()) for part in (u[:, kept:], s[kept:], v[kept:]))
        self.bias = nn.Parameter(linear.bias.detach().clone()) if linear.bias is not None else None

    def weight(self) -> Tensor:
        return (self.u_high * self.s_high) @ self.v_high + (self.u * self.s) @ self.v

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(), self.bias)

    @torch.no_grad()
    def project(self, u: Tensor, v: Tensor) -> None:
        u.sub_(self.u_high @ (self.u_high.T @ u))
        v.sub_((v @ self.v_high.T) @ self.v_high)


def factored(model: nn.Module, kept: dict[str, int]) -> nn.Module:
    """`model` with its linear layers named in `kept` replaced, in place."""
    for name, rank in kept.items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, FactoredLinear(owner.get_submodule(leaf), rank))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """Clip, project the gradients, move, project the factors; the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm is not None else float("inf"))
    layers: list[Any] = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    for layer in layers:
        layer.project(layer.u.grad, layer.v.grad)
    optimizer.step()
    for layer in layers:
        layer.project(layer.u.data, layer.v.data)
    optimizer.zero_grad()
    return norm


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight().detach() if isinstance(module, FactoredLinear) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (FactoredLinear, nn.Linear))
    }
