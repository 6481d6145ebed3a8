"""A weight cut in two by its singular values: the directions that are protected, and those that may move.

Every matrix is looked at with its longer side first: a wide weight is handled as its transpose, which only swaps U and
V. So the columns of V are the short side, and the complement of what is protected there is spanned by the low part
itself; on the long side it is, only where the matrix is square.
"""

# N rows, M <= N columns, k protected, r = M - k low directions

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

# U = W V^T / sigma, with V from the Gram matrix, is orthonormal to 2e-16 (sigma_1 / sigma)^2: 2e-8 at this share of
# sigma_1, a third of what rounding to float32 costs. Smaller ones are made orthonormal by a QR decomposition.
WELL_CONDITIONED = 1e-4
GRAM_PARTS = 8  # of the columns: the symmetric product of so many parts costs 9/16 of the whole one


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

    @property
    def short_side(self) -> int:
        return self.right.shape[-1]

    def project_left(self, x: Tensor, products: torch.dtype | None = None) -> Tensor:
        """(I - U_h U_h^T) x, for x [..., N, r]; products: the format that is multiplied in, if not that of x."""
        basis = (self.left if self.is_square else self.protected).to(products or x.dtype)
        inside = (basis @ (basis.mT @ x.to(basis.dtype))).to(x.dtype)
        return inside if self.is_square else x - inside

    def project_right(self, x: Tensor, products: torch.dtype | None = None) -> Tensor:
        """x (I - V_h^T V_h), for x [..., r, M]."""
        basis = self.right.to(products or x.dtype)
        return ((x.to(basis.dtype) @ basis.mT) @ basis).to(x.dtype)

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


def scratch_bytes(rows: int, columns: int, low: int) -> int:
    """Bytes that come and go while a matrix of so many rows, and columns that are no more, is cut, beside it and what
    is kept of it: for each number 48 of a square one, 25 of one with 3.5 times as many rows.

    In float64. There is most where LAPACK looks for eigenvectors: the matrix, its Gram matrix, and four of the size of
    that besides; or then: both sides of the matrix, and the low one twice. One that has singular values of nearly
    nothing, whose columns are made orthonormal, takes half as much again, a long one twice as much.
    """
    solving = 8 * rows * columns + 40 * columns**2
    sides = 8 * rows * (columns if rows > columns else low) + 8 * rows * low
    return max(solving, 8 * rows * columns + 16 * columns**2 + sides)


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
        spectra = [_spectrum(matrix, one) for matrix, one in zip(stack, earlier, strict=True)]
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
    is_square = matrix.shape[0] == matrix.shape[1]
    earlier = matrix.new_zeros(matrix.shape[0], 0, dtype=dtype) if before is None else before.protected
    found = _singular(_free_part(matrix, before), earlier, kept, is_exact=matrix.dtype == torch.float64)
    v, v_high, u, u_high = found.right, found.right_high, found.left, found.left_high
    if before is not None:
        v, v_high = v @ before.right.double(), v_high @ before.right.double()
        u = before.left.double() @ u if is_square else u
        u_high = before.left.double() @ u_high.double() if is_square and u_high is not None else u_high
    left, right = u.to(dtype), v.to(dtype)
    overlap_left = matrix.new_zeros(0, 0, dtype=torch.float64)
    if is_square:
        overlap_left = _rounding(left, u) if u_high is None else _gram(u_high.T.double() @ left.double())
    # All of it is what rounding added to `v`, of which dtype holds enough.
    overlap_right = _gram(v_high.to(dtype) @ (right.double() - v).to(dtype).T).double()
    if before is not None:  # the rounding of the earlier cut is still there
        overlap_right += _turned(before.overlap_right, before.right.double() @ v.T)
        if is_square:
            overlap_left += _turned(before.overlap_left, before.left.double().T @ u)
    protected = earlier if is_square or u_high is None else torch.cat([earlier, u_high.to(dtype)], dim=1)
    return Split(
        left=left.contiguous(),
        values=found.values.to(dtype),
        right=right.contiguous(),
        protected=protected.contiguous(),
        overlap_left=overlap_left.to(dtype),
        overlap_right=overlap_right.to(dtype),
        norm=torch.linalg.matrix_norm(matrix.to(dtype)),
    )


def _rounding(rounded: Tensor, exact: Tensor) -> Tensor:
    """Of the columns of `rounded`, what lies outside the span of those they are the rounding of: X^T X."""
    apart = rounded.double() - exact
    return _gram(apart - exact @ (exact.T @ apart))


def _turned(overlap: Tensor, turn: Tensor) -> Tensor:
    return turn.T @ overlap.double() @ turn


def _free_part(matrix: Tensor, before: Split | None) -> Tensor:
    """What of a matrix [N, M] may still be cut, in the coordinates of the free directions: [N or r, r]."""
    if before is None:
        return matrix
    inside = matrix.double() @ before.right.double().T
    if before.is_square:
        return before.left.double().T @ inside
    basis = before.protected.double()
    return inside - basis @ (basis.T @ inside)


def _spectrum(matrix: Tensor, before: Split | None) -> Tensor:
    return torch.linalg.eigvalsh(lower_gram(_free_part(matrix, before))).clamp_min(0).sqrt().flip(-1)


def _gram(x: Tensor) -> Tensor:
    return x.T @ x


def lower_gram(x: Tensor) -> Tensor:
    """Of x^T x in float64 what eigh reads: the lower triangle, and a little of the rest."""
    x, width = x.double(), x.shape[1]
    gram = x.new_empty(width, width)
    part = -(-width // GRAM_PARTS)
    for start in range(0, width, part):
        end = start + part
        torch.mm(x[:, start:end].T, x[:, :end], out=gram[start:end, :end])
    return gram


def eigh(lower: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh; on a CPU numpy's, which comes with OpenBLAS: a fifth faster than MKL on an AMD EPYC."""
    if lower.device.type != "cpu":
        return torch.linalg.eigh(lower)
    values, vectors = np.linalg.eigh(lower.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


@dataclass(frozen=True)
class _Singular:
    """x [N, M] = U diag(s) V, cut in two: the low part, and bases of what is protected.

    left [N, r], values [r], right [r, M] in float64; right_high [k, M]; left_high [N, k] where it was needed.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    right_high: Tensor
    left_high: Tensor | None


def _singular(x: Tensor, earlier: Tensor, kept: int, *, is_exact: bool) -> _Singular:
    """The singular value decomposition of x [N, M], as far as a cut needs it; U is orthogonal to `earlier`.

    is_exact: x says something down to the last bit of float64, which a Gram matrix loses: then by a full decomposition.
    Else V is the eigenvectors of x^T x: faster, and exact to about 1e-8 of the largest singular value.
    """
    if is_exact:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        if _is_well_conditioned(s[-1:], s[0]):
            return _Singular(u[:, kept:], s[kept:], v[kept:], v[:kept], u[:, :kept])
        return _made_orthonormal(u, s, v, earlier, kept)
    x = x.double()
    squares, vectors = eigh(lower_gram(x))
    # Rows in order: to multiply by columns of x^T takes half as long as the other way around.
    largest, v = squares[-1].clamp_min(0).sqrt(), vectors.T.flip(0)
    low = (v[kept:] @ x.T).T
    s = torch.linalg.vector_norm(low, dim=0)
    if not _is_well_conditioned(s, largest):
        u = torch.cat([(v[:kept] @ x.T).T, low], dim=1)
        s = torch.linalg.vector_norm(u, dim=0)
        return _made_orthonormal(u / s.clamp_min(torch.finfo(torch.float64).tiny), s, v, earlier, kept)
    high = None  # on the long side of a matrix that is not square the low part does not span the complement
    if x.shape[0] > x.shape[1]:
        high = (v[:kept] @ x.T).T
        high /= torch.linalg.vector_norm(high, dim=0)
    return _Singular(low / s, s, v[kept:], v[:kept], high)


def _is_well_conditioned(low: Tensor, largest: Tensor) -> bool:
    return float(low.min()) > WELL_CONDITIONED * float(largest)


def _made_orthonormal(u: Tensor, s: Tensor, v: Tensor, earlier: Tensor, kept: int) -> _Singular:
    basis, triangle = torch.linalg.qr(torch.cat([earlier.double(), u], dim=1))
    # QR may turn a column around, and finds directions of its own for those that x sends to nothing.
    signs = torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0).to(basis.dtype)
    u = (basis * signs)[:, earlier.shape[1] :]
    return _Singular(u[:, kept:], s[kept:], v[kept:], v[:kept], u[:, :kept])
