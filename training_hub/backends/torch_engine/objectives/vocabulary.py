"""Tokens over which distributions are summed: all are here, or a rank's own, of ranks that have all together."""

# R rows of one chunk, C tokens that both vocabularies have, of them those that are here, K tokens of each row

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training_hub.backends.torch_engine.layouts.shared import Rows


class Vocabulary(Protocol):
    """What is the same for logits of all tokens and of some: numbers of a row are on every rank, its tokens on one."""

    @property
    def tokens(self) -> slice:
        """Those that are here."""
        ...

    def log_softmax(self, *logits_RC: Tensor) -> list[Tensor]:
        """Of each, over all tokens."""
        ...

    def summed(self, *sums_R: Tensor) -> list[Tensor]:
        """Over all tokens, from sums over those that are here."""
        ...

    def gathered(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        """[R, K]: the numbers of these tokens."""
        ...

    def without(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        """A copy in which the numbers of these tokens are 0."""
        ...

    def add_(self, x_RC: Tensor, ids_RK: Tensor, values_RK: Tensor) -> Tensor:
        """`x` itself, with these added to the numbers of these tokens."""
        ...


@dataclass(frozen=True)
class Whole:
    """All of `common` tokens."""

    common: int

    @property
    def tokens(self) -> slice:
        return slice(0, self.common)

    def log_softmax(self, *logits_RC: Tensor) -> list[Tensor]:
        return [torch.log_softmax(one_RC, -1) for one_RC in logits_RC]

    def summed(self, *sums_R: Tensor) -> list[Tensor]:
        return list(sums_R)

    def gathered(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        return x_RC.gather(-1, ids_RK)

    def without(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        return x_RC.scatter(-1, ids_RK, 0.0)

    def add_(self, x_RC: Tensor, ids_RK: Tensor, values_RK: Tensor) -> Tensor:
        return x_RC.scatter_add_(-1, ids_RK, values_RK)


@dataclass(frozen=True)
class Split:
    """Of `common` tokens those among the `rows` that this rank has of a head; there may be none."""

    rows: Rows
    common: int

    @property
    def tokens(self) -> slice:
        return slice(min(self.rows.start, self.common), min(self.rows.end, self.common))

    def log_softmax(self, *logits_RC: Tensor) -> list[Tensor]:
        """Two exchanges for all of them: of the largest logit of each row, and of a sum."""
        highest = self.rows.highest_(torch.stack([_highest(one_RC) for one_RC in logits_RC]))
        moved = [one_RC - most_R[:, None] for one_RC, most_R in zip(logits_RC, highest, strict=True)]
        masses = self.rows.summed_(torch.stack([one_RC.exp().sum(-1) for one_RC in moved]))
        return [one_RC.sub_(mass_R.log()[:, None]) for one_RC, mass_R in zip(moved, masses, strict=True)]

    def summed(self, *sums_R: Tensor) -> list[Tensor]:
        return list(self.rows.summed_(torch.stack(sums_R)))

    def gathered(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        if not x_RC.shape[-1]:
            return self.rows.summed_(x_RC.new_zeros(ids_RK.shape))
        found_RK = x_RC.gather(-1, self._places(x_RC, ids_RK))
        return self.rows.summed_(found_RK.masked_fill(~self.rows.here(ids_RK), 0))

    def without(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        if not x_RC.shape[-1]:
            return x_RC
        kept_RK = (~self.rows.here(ids_RK)).to(x_RC.dtype)
        return x_RC.scatter_reduce(-1, self._places(x_RC, ids_RK), kept_RK, "prod")

    def add_(self, x_RC: Tensor, ids_RK: Tensor, values_RK: Tensor) -> Tensor:
        if not x_RC.shape[-1]:
            return x_RC
        return x_RC.scatter_add_(-1, self._places(x_RC, ids_RK), values_RK.masked_fill(~self.rows.here(ids_RK), 0))

    def _places(self, x_RC: Tensor, ids_RK: Tensor) -> Tensor:
        """The place here of each token; that of some other where it is not here."""
        return self.rows.local(ids_RK).clamp_max(x_RC.shape[-1] - 1)


def _highest(logits_RC: Tensor) -> Tensor:
    return logits_RC.amax(-1) if logits_RC.shape[-1] else logits_RC.new_full((len(logits_RC),), -torch.inf)
