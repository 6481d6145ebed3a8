"""A weight cut in two by its singular values: the directions that are protected, and those that may move.

Every matrix is looked at with its longer side first: a wide weight is handled as its transpose, which only swaps U and
V. So the columns of V are the short side, and the complement of what is protected there is spanned by the low part
itself; on the long side it is, only where the matrix is square.
"""

# N rows, M <= N columns, k protected, r = M - k low directions

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# U = W V^T / sigma, with V from the Gram matrix, is orthonormal to 2e-16 (sigma_1 / sigma)^2: 2e-10 at this share of
# sigma_1. Smaller ones are made orthonormal by a QR decomposition.
WELL_CONDITIONED = 1e-3


@dataclass(frozen=True)
class Split:
    """The low part of a weight W [..., N, M], N >= M, and what keeps it apart from the protected one.

    left U0 [..., N, r], values S0 [..., r], right V0 [..., r, M]: W = W_high + U0 diag(S0) V0.
    protected U_h [..., N, k]: the protected columns; none where N = M, since U0 spans their complement then.
    overlap_left, overlap_right [..., r, r]: (U_h^T U0)^T (U_h^T U0), of a square weight, and (V0 V_h^T)(V0 V_h^T)^T,
    which are rounding alone: what of a move along U0 or V0 lies in the protected space. norm [...]: of W, Frobenius's.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    protected: Tensor
    overlap_left: Tensor
    overlap_right: Tensor
    norm: Tensor

    @property
    def is_square(self) -> bool:
        return self.left.shape[-2] == self.right.shape[-1]

    def project_left(self, x: Tensor) -> Tensor:
        """(I - U_h U_h^T) x, for x [..., N, r]."""
        if self.is_square:
            return self.left @ (self.left.mT @ x)
        return x - self.protected @ (self.protected.mT @ x)

    def project_right(self, x: Tensor) -> Tensor:
        """x (I - V_h^T V_h), for x [..., r, M]."""
        return (x @ self.right.mT) @ self.right

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rank_kept(side: int, unfreeze_rank_ratio: float) -> int:
    """How many of `side` singular directions are protected: floor(side (1 - ratio)), all for ratio 0, else side - 1 at
    most.

    The reference (mini_trainer 0.9) trains one direction also for ratio 0, and takes ratio 1 for one half.
    """
    if unfreeze_rank_ratio == 0:
        return side
    # 1 - 0.9 is a little less than 0.1: ten directions at ratio 0.9 keep one.
    return min(math.floor(side * (1 - unfreeze_rank_ratio) + 1e-9), side - 1)


def rank_of_energy(values: Tensor, energy: float) -> int:
    """The smallest k whose largest `values` hold the share `energy` of the sum of all squares; one less than all at
    most. values [..., M], falling: for a stack, the largest such k of its matrices."""
    squares = values.double().square()
    held = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # Rounding leaves the last sum a little below 1.
    short = (held < energy * (1 - 1e-12)).sum(-1) + 1
    return min(int(short.max()), values.shape[-1] - 1)


def split(weight: Tensor, kept: int | None, before: Split | None = None, energy: float = 0.0) -> Split:
    """Cut `weight` [..., N, M], N >= M, so that its largest `kept` directions are protected.

    before: what an earlier task protected; then `kept` counts only the directions that are added to it, the largest of
    what is free. kept None: as many as hold `energy` (of what is free). In float32, or float64 for such weights.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    stack = weight.reshape(-1, *weight.shape[-2:])
    earlier = [None] * len(stack) if before is None else _matrices_of(before, weight.shape[:-2])
    if kept is None:
        spectra = [_spectrum(matrix.double(), one) for matrix, one in zip(stack, earlier, strict=True)]
        kept = rank_of_energy(torch.stack(spectra), energy)
    # One matrix at a time: a stack of experts in float64 would be large.
    parts = [_split_matrix(matrix, kept, one, dtype) for matrix, one in zip(stack, earlier, strict=True)]
    lead = weight.shape[:-2]
    return Split(
        **{
            name: torch.stack([getattr(part, name) for part in parts]).reshape((*lead, *tensor.shape))
            for name, tensor in parts[0].tensors().items()
        }
    )


def _matrices_of(stack: Split, lead: torch.Size) -> list[Split]:
    """The splits of the matrices of a stack of shape `lead`; of one matrix where that is empty."""
    flat = {name: [t] if not lead else list(t.flatten(0, len(lead) - 1)) for name, t in stack.tensors().items()}
    return [Split(**{name: part[index] for name, part in flat.items()}) for index in range(lead.numel())]


def _split_matrix(matrix: Tensor, kept: int, before: Split | None, dtype: torch.dtype) -> Split:
    exact = matrix.double()
    is_square = matrix.shape[0] == matrix.shape[1]
    earlier = exact[:, :0] if before is None else before.protected.double()
    u, s, v = _singular(_free_part(exact, before), earlier, is_exact=matrix.dtype == torch.float64)
    if before is not None:
        v = v @ before.right.double()
        u = before.left.double() @ u if is_square else u
    left, right = u[:, kept:].to(dtype), v[kept:].to(dtype)
    overlap_left = _gram(u[:, :kept].T @ left.double()) if is_square else exact.new_zeros(0, 0)
    overlap_right = _gram(v[:kept] @ right.double().T)
    if before is not None:  # the rounding of the earlier cut is still there
        overlap_right += _turned(before.overlap_right, before.right.double() @ v[kept:].T)
        if is_square:
            overlap_left += _turned(before.overlap_left, before.left.double().T @ u[:, kept:])
    return Split(
        left=left.contiguous(),
        values=s[kept:].to(dtype),
        right=right.contiguous(),
        protected=(exact[:, :0] if is_square else torch.cat([earlier, u[:, :kept]], dim=1)).to(dtype).contiguous(),
        overlap_left=overlap_left.to(dtype),
        overlap_right=overlap_right.to(dtype),
        norm=torch.linalg.matrix_norm(exact).to(dtype),
    )


def _turned(overlap: Tensor, turn: Tensor) -> Tensor:
    return turn.T @ overlap.double() @ turn


def _free_part(exact: Tensor, before: Split | None) -> Tensor:
    """What of a matrix [N, M] may still be cut, in the coordinates of the free directions: [N or r, r]."""
    if before is None:
        return exact
    inside = exact @ before.right.double().T
    if before.is_square:
        return before.left.double().T @ inside
    basis = before.protected.double()
    return inside - basis @ (basis.T @ inside)


def _spectrum(exact: Tensor, before: Split | None) -> Tensor:
    return torch.linalg.eigvalsh(_gram(_free_part(exact, before))).clamp_min(0).sqrt().flip(-1)


def _gram(x: Tensor) -> Tensor:
    return x.T @ x


def _singular(x: Tensor, earlier: Tensor, *, is_exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, M] = U diag(s) V with falling s: U [N, M], s [M], V [M, M], in float64; U is orthogonal to `earlier`.

    is_exact: x says something down to the last bit of float64, which a Gram matrix loses: then by a full decomposition.
    Else V is the eigenvectors of x^T x: many times faster, and exact to about 1e-8 of the largest singular value.
    """
    if is_exact:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
    else:
        v = torch.linalg.eigh(_gram(x)).eigenvectors.flip(-1).T
        moved = x @ v.T
        s = torch.linalg.vector_norm(moved, dim=0)
        u = moved / s.clamp_min(torch.finfo(torch.float64).tiny)
    if float(s.min()) > WELL_CONDITIONED * float(s.max()):
        return u, s, v
    columns = torch.cat([earlier, u], dim=1)
    basis, triangle = torch.linalg.qr(columns)
    # QR may turn a column around, and finds directions of its own for those that x sends to nothing.
    signs = torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(basis.dtype)
    return (basis * signs)[:, earlier.shape[1] :], s, v
