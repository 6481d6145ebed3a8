"""The form of the reference: three factors are trained, W = W_high + U diag(S) V.

What is trained are their differences from the start, U = U0 + A, S = S0 + s, V = V0 + B. An optimizer whose step does
not look at the value of a weight goes the same way on both; but a projection in float32 leaves a rounding error in
proportion to what it is given, and A is as small as what was learned, where U is as large as the weight.
"""

# N rows, M <= N columns, k protected, r low directions, as in decompose.py

from __future__ import annotations

import torch
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split


class Factors:
    """A [..., N, r], s [..., r] and B [..., r, M] of one weight, all 0 at first."""

    def __init__(self, split: Split):
        self.split = split
        self.left = torch.zeros_like(split.left)
        self.values = torch.zeros_like(split.values)
        self.right = torch.zeros_like(split.right)

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves."""
        return {"left": self.left, "values": self.values, "right": self.right}

    def totals(self) -> dict[str, Tensor]:
        """U, S and V themselves, which weight decay is about."""
        at = self.split
        return {"left": at.left + self.left, "values": at.values + self.values, "right": at.right + self.right}

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """The chain rule from G = dL/dW [..., N, M], in whose format it is multiplied: with GV = G V^T,

        dU = GV diag(S), dS_i = <U_i, GV_i>, dV = diag(S) U^T G.
        """
        now = self.totals()
        u, s, v = now["left"], now["values"], now["right"]
        gv = (gradient @ v.to(gradient.dtype).mT).to(v.dtype)
        ug = (u.to(gradient.dtype).mT @ gradient).to(u.dtype)
        return {"left": gv * s[..., None, :], "values": (u * gv).sum(-2), "right": s[..., None] * ug}

    def project(self, tensors: dict[str, Tensor], products: torch.dtype | None = None) -> dict[str, Tensor]:
        """Weights or their gradients, without what points into the protected space.

        products: the format that is multiplied in, if not that of the tensors.
        """
        left = self.split.project_left(tensors["left"], products)
        return {**tensors, "left": left, "right": self.split.project_right(tensors["right"], products)}

    def low(self) -> Tensor:
        """L [..., N, r], for which the weight has moved by D = L V0.

        The short side never leaves the span of V0: B = b V0 with b = B V0^T, so V = (I + b) V0 and
        D = (U diag(S) (I + b) - U0 diag(S0)) V0.
        """
        at = self.split
        us = (at.left + self.left) * (at.values + self.values)[..., None, :]
        return (
            torch.matmul(us, self.right @ at.right.mT)
            .add_(self.left * at.values[..., None, :])
            .add_((at.left + self.left) * self.values[..., None, :])
        )
