"""What a teacher says about the trained tokens of a pack, in one of three forms.

    WholeTargets     its states and head, so that its logits are made chunk by chunk, and never kept
    TopTargets       its likeliest tokens, and the mass of all others as one
    DrawnTargets     tokens drawn from it

`losses_and_gradient` is what a form makes of a chunk of the student's logits; `plain_losses` the same from whole
logits, by operators that autograd can differentiate.
"""

# N trained positions, R rows of one chunk, C tokens that both vocabularies have, or those of them that are here,
# K tokens of the teacher's kept

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused.functions import are_fit, bucket_divergence_, divergence_
from training_hub.backends.torch_engine.objectives.divergence import KINDS, Divergence
from training_hub.backends.torch_engine.objectives.head import Head
from training_hub.backends.torch_engine.objectives.vocabulary import Vocabulary, Whole


@dataclass(frozen=True)
class Weighed:
    """What a kernel needs beside targets of a teacher: of one chunk, targets and weights of the tokens themselves, and
    the multiplier of the student's logits."""

    targets_R: Tensor
    weights_R: Tensor
    multiplier: float


class Targets(Protocol):
    """A teacher's word on N trained tokens."""

    @property
    def has_kernel(self) -> bool: ...

    def on_kernel_(self, logits_RV: Tensor, part: slice, divergence: Divergence, weighed: Weighed) -> Tensor:
        """Losses [R], weighted; `logits_RV` become the gradient of their sum."""
        ...

    def losses_and_gradient(
        self, logits_RC: Tensor, part: slice, divergence: Divergence, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        """D [R], and the gradient [R, C] of its sum by the logits of the vocabulary that are here, times the
        temperature."""
        ...

    def plain_losses(self, logits_NC: Tensor, divergence: Divergence) -> Tensor:
        """D [N]."""
        ...


@dataclass(frozen=True)
class WholeTargets:
    """states_ND and head: what makes the teacher's logits; or logits_NV themselves, of a teacher whose head is more
    than a matrix. common: tokens that both vocabularies have."""

    common: int
    states_ND: Tensor | None = None
    head: Head | None = None
    logits_NV: Tensor | None = None

    @property
    def has_kernel(self) -> bool:
        if self.head is None or self.states_ND is None or self.head.bias is not None or self.head.cap is not None:
            return False
        return are_fit(self.states_ND, self.head.weight)

    def logits(self, part: slice, tokens: slice | None = None) -> Tensor:
        """[R, C] in float32 at least: the teacher's logits of these positions, for all common tokens or some."""
        tokens = slice(0, self.common) if tokens is None else tokens
        if self.logits_NV is not None:
            return self.logits_NV[part, tokens].to(torch.promote_types(self.logits_NV.dtype, torch.float32))
        assert self.head is not None and self.states_ND is not None
        return self.head.of_tokens(tokens).logits(self.states_ND[part])

    def on_kernel_(self, logits_RV: Tensor, part: slice, divergence: Divergence, weighed: Weighed) -> Tensor:
        assert self.head is not None and self.states_ND is not None
        teacher_RV = self.states_ND[part] @ self.head.weight.T
        given = (logits_RV, teacher_RV, weighed.targets_R, weighed.weights_R)
        kind = KINDS.index(divergence.kind)
        return divergence_(
            *given, self.common, weighed.multiplier, self.head.multiplier, kind, divergence.beta,
            divergence.temperature, divergence.alpha,
        )  # fmt: skip

    def losses_and_gradient(
        self, logits_RC: Tensor, part: slice, divergence: Divergence, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        teacher_RC = self.logits(part, vocabulary.tokens).to(logits_RC.dtype) / divergence.temperature
        log_p_RC, log_q_RC = vocabulary.log_softmax(teacher_RC, logits_RC / divergence.temperature)
        del teacher_RC
        return divergence.with_gradient(log_p_RC, log_q_RC, vocabulary.summed)

    def plain_losses(self, logits_NC: Tensor, divergence: Divergence) -> Tensor:
        log_p_NC = torch.log_softmax(self.logits(slice(None)).to(logits_NC.dtype) / divergence.temperature, -1)
        return divergence.value(log_p_NC, torch.log_softmax(logits_NC / divergence.temperature, -1))


@dataclass(frozen=True)
class TopTargets:
    """ids_NK int64, logs_NK: the teacher's log-probabilities at the divergence's temperature; tails_N: the mass of all
    other tokens, which are one entry of both distributions; None where there are no others."""

    ids_NK: Tensor
    logs_NK: Tensor
    tails_N: Tensor | None
    common: int

    has_kernel = True

    def on_kernel_(self, logits_RV: Tensor, part: slice, divergence: Divergence, weighed: Weighed) -> Tensor:
        tails_R = self.tails_N[part] if self.tails_N is not None else self.logs_NK.new_full((len(logits_RV),), -1.0)
        kind = KINDS.index(divergence.kind)
        return bucket_divergence_(
            logits_RV, self.ids_NK[part], self.logs_NK[part], tails_R, weighed.targets_R, weighed.weights_R,
            self.common, weighed.multiplier, kind, divergence.beta, divergence.temperature, divergence.alpha,
        )  # fmt: skip

    def losses_and_gradient(
        self, logits_RC: Tensor, part: slice, divergence: Divergence, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        log_p_RB, log_q_RB, others_RC = self._entries(logits_RC, part, divergence, vocabulary)
        value_R, gradient_RB = divergence.with_gradient(log_p_RB, log_q_RB)
        if self.tails_N is not None:
            # A token of the tail has its share of what moves the tail as a whole.
            others_RC.mul_(gradient_RB[:, -1:] / log_q_RB[:, -1:].exp())
        else:
            others_RC.zero_()
        kept_RK = gradient_RB[:, : self.ids_NK.shape[-1]]
        return value_R, vocabulary.add_(others_RC, self.ids_NK[part], kept_RK)

    def plain_losses(self, logits_NC: Tensor, divergence: Divergence) -> Tensor:
        return divergence.value(*self._entries(logits_NC, slice(None), divergence, Whole(self.common))[:2])

    def _entries(
        self, logits_RC: Tensor, part: slice, divergence: Divergence, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of both distributions over the kept tokens and, last, all others; the student's probabilities of
        these."""
        ids_RK, log_p_RB = self.ids_NK[part], self.logs_NK[part].to(logits_RC.dtype)
        (log_q_RC,) = vocabulary.log_softmax(logits_RC / divergence.temperature)
        log_q_RB, others_RC = vocabulary.gathered(log_q_RC, ids_RK), vocabulary.without(log_q_RC.exp(), ids_RK)
        if self.tails_N is not None:
            least = torch.finfo(logits_RC.dtype).tiny
            tail_R = self.tails_N[part].to(logits_RC.dtype).clamp_min(least)
            (others_R,) = vocabulary.summed(others_RC.sum(-1))
            log_p_RB = torch.cat([log_p_RB, tail_R.log()[:, None]], -1)
            log_q_RB = torch.cat([log_q_RB, others_R.clamp_min(least).log()[:, None]], -1)
        return log_p_RB, log_q_RB, others_RC


@dataclass(frozen=True)
class DrawnTargets:
    """ids_NK int64: tokens drawn from the teacher at the divergence's temperature, with their repetitions, so that
    their mean is unbiased; entropies_N: of its whole distribution, so that the mean of D is KL(p, q).

    Random sampling of targets: Anshumann et al. 2025, arXiv:2503.16870, here with the teacher itself as the proposal,
    for which all importance weights are 1.
    """

    ids_NK: Tensor
    entropies_N: Tensor
    common: int

    has_kernel = True

    def on_kernel_(self, logits_RV: Tensor, part: slice, divergence: Divergence, weighed: Weighed) -> Tensor:
        nothing_RK = self.entropies_N.new_empty(0)
        return bucket_divergence_(
            logits_RV, self.ids_NK[part], nothing_RK, self.entropies_N[part], weighed.targets_R, weighed.weights_R,
            self.common, weighed.multiplier, len(KINDS), divergence.beta, divergence.temperature, divergence.alpha,
        )  # fmt: skip

    def losses_and_gradient(
        self, logits_RC: Tensor, part: slice, divergence: Divergence, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        ids_RK = self.ids_NK[part]
        share_RK = logits_RC.new_full(ids_RK.shape, -1.0 / ids_RK.shape[-1])
        (log_q_RC,) = vocabulary.log_softmax(logits_RC / divergence.temperature)
        value_R = -vocabulary.gathered(log_q_RC, ids_RK).mean(-1) - self.entropies_N[part].to(logits_RC.dtype)
        return value_R, vocabulary.add_(log_q_RC.exp_(), ids_RK, share_RK)

    def plain_losses(self, logits_NC: Tensor, divergence: Divergence) -> Tensor:
        log_q_NC = torch.log_softmax(logits_NC / divergence.temperature, -1)
        return -log_q_NC.gather(-1, self.ids_NK).mean(-1) - self.entropies_N.to(logits_NC.dtype)
