"""The core form: one matrix between two fixed bases is trained, W = W_high + Q_U C Q_V.

It reaches the same weights as the factors. Nothing needs to be projected where both bases are known, and a step does
not depend on how small the singular values are that it starts from. On the long side of a matrix that is not square the
complement is larger than r, and a projected factor takes the place of Q_U C.
"""

# N rows, M <= N columns, k protected, r low directions, as in decompose.py

from __future__ import annotations

import torch
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split


class Core:
    """C - diag(S0) [..., r, r] of a square weight, or L [..., N, r] of another, 0 at first; Q_U = U0, Q_V = V0."""

    def __init__(self, split: Split):
        self.split = split
        at = split.left
        self.core = at.new_zeros(*at.shape[:-2], at.shape[-1] if split.is_square else at.shape[-2], at.shape[-1])

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves."""
        return {"core": self.core}

    def totals(self) -> dict[str, Tensor]:
        """C itself, or U0 diag(S0) + L, which weight decay is about."""
        at = self.split
        start = torch.diag_embed(at.values) if at.is_square else at.left * at.values[..., None, :]
        return {"core": start + self.core}

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """dC = Q_U^T G Q_V^T from G = dL/dW [..., N, M], or dL = (I - U_h U_h^T) G V0^T."""
        at, products = self.split, gradient.dtype
        long = gradient @ at.right.to(products).mT
        if at.is_square:
            return {"core": (at.left.to(products).mT @ long).to(at.left.dtype)}
        return {"core": at.project_left(long.to(at.left.dtype), products)}

    def project(self, tensors: dict[str, Tensor], products: torch.dtype | None = None) -> dict[str, Tensor]:
        """Weights or their gradients, without what points into the protected space; products: as for Factors."""
        return tensors if self.split.is_square else {"core": self.split.project_left(tensors["core"], products)}

    def low(self) -> Tensor:
        """L [..., N, r], for which the weight has moved by D = L V0."""
        return self.split.left @ self.core if self.split.is_square else self.core.clone()
