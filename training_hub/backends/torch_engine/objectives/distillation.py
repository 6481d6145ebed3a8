"""Distillation: how far the model's next token is from a teacher's, summed over the trained tokens of a pack."""

# N trained positions, R rows of one chunk, V vocabulary of the student, C tokens that both vocabularies have; of both
# those that are here, where they are split over ranks

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from training_hub.backends.torch_engine.as_forward import as_forward
from training_hub.backends.torch_engine.layouts.cut import route_of
from training_hub.backends.torch_engine.layouts.shared import Rows
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy, decoder_states, model_logits
from training_hub.backends.torch_engine.objectives.divergence import Divergence
from training_hub.backends.torch_engine.objectives.head import find_head
from training_hub.backends.torch_engine.objectives.targets import Targets, Weighed
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion, TokenLoss
from training_hub.backends.torch_engine.objectives.vocabulary import Split, Vocabulary, Whole
from training_hub.backends.torch_engine.tensors import PackTensors, Term
from training_hub.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teaching(Protocol):
    """Where a teacher's word comes from. common: tokens that both vocabularies have; ids above it are padding.

    on_excerpts: the same for packs that are made up of pieces of samples, which proofs are tried on; what is kept by
    sample has nothing to say there.
    """

    @property
    def common(self) -> int: ...

    def targets(self, pack: PackTensors) -> Targets: ...

    def on_excerpts(self) -> Teaching: ...


@dataclass(frozen=True)
class Distillation:
    """Sum over trained tokens of weight * (alpha * temperature^2 * D(teacher, student) + (1 - alpha) * loss), where
    loss is cross-entropy or what TokenLoss makes of it, not divided.

    plain: the student's cross-entropy, which knows how its head is to be run.
    """

    plain: CrossEntropy
    divergence: Divergence
    loss: TokenLoss
    teaching: Teaching

    def __call__(self, model: PreTrainedModel, pack: PackTensors) -> Term:
        targets = self.teaching.targets(pack)
        return Term(*as_forward(model, lambda: self._losses(model, pack, targets)))

    def _losses(self, model: PreTrainedModel, pack: PackTensors, targets: Targets) -> tuple[Tensor, Tensor]:
        """Their sum, and each of them without gradients."""
        head = find_head(model, is_split=self.plain.is_split) if self.plain.through_head else None
        if head is None:
            losses_N = self.plain_losses(model, pack, targets)
            return losses_N.sum(), losses_N.detach()
        states_ND = decoder_states(model, pack)
        tokens = TokenCriterion(self.loss, pack.targets, pack.target_weights)
        return head.weigh(states_ND, DistillationCriterion(self.divergence, tokens, targets, self.teaching.common))

    def plain_losses(self, model: PreTrainedModel, pack: PackTensors, targets: Targets | None = None) -> Tensor:
        """[N]: the weighted losses of the pack's trained tokens, from the student's whole logits."""
        logits_NV = model_logits(model, pack)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

        def losses() -> tuple[Tensor, ...]:
            return (self._losses_of(logits_NV, pack, targets if targets is not None else self.teaching.targets(pack)),)

        route = route_of(model)
        # Of a model in stages the process with the last one has the teacher, and tells the others.
        return (losses() if route is None else route.told(1, logits_NV, losses))[0]

    def _losses_of(self, logits_NV: Tensor, pack: PackTensors, targets: Targets) -> Tensor:
        losses_N = self.divergence.scale * targets.plain_losses(logits_NV[:, : self.teaching.common], self.divergence)
        if self.divergence.alpha < 1:
            losses_N = losses_N + (1 - self.divergence.alpha) * self.loss.losses(logits_NV, pack.targets)
        return losses_N * pack.target_weights.to(logits_NV.dtype)


def from_teacher(plain: CrossEntropy, recipe: Recipe, teaching: Teaching | None) -> Distillation:
    """The objective that the recipe's sections `distillation` and `loss` ask for."""
    assert teaching is not None
    return Distillation(plain, Divergence.of(recipe.distillation), TokenLoss.of(recipe.loss), teaching)


@dataclass(frozen=True)
class DistillationCriterion:
    """The weighted losses of tokens against a teacher's targets, chunk by chunk of the student's logits, with the
    gradient formed beside them.

    rows: those tokens whose logits are here, where the vocabulary is split over ranks. Of the teacher's logits each
    then makes those of the same tokens; what is exchanged is a few numbers for each row, and for each token that is
    kept of the teacher's.
    """

    divergence: Divergence
    tokens: TokenCriterion
    targets: Targets
    common: int
    rows: Rows | None = None

    @property
    def has_kernel(self) -> bool:
        is_known = self.tokens.loss == PLAIN or self.divergence.alpha == 1
        return self.rows is None and self.targets.has_kernel and is_known

    def of_rows(self, rows: Rows) -> DistillationCriterion:
        """The same where the vocabulary is split over ranks."""
        return replace(self, rows=rows)

    def on_kernel_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor:
        weighed = Weighed(self.tokens.targets_N[part], self.tokens.weights_N[part].float(), multiplier)
        return self.targets.on_kernel_(logits_RV, part, self.divergence, weighed)

    def in_torch_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor:
        share, weights_R = 1 - self.divergence.alpha, self.tokens.weights_N[part].to(logits_RV.dtype)
        vocabulary: Vocabulary = Whole(self.common) if self.rows is None else Split(self.rows, self.common)
        common_RC = logits_RV[:, : vocabulary.tokens.stop - vocabulary.tokens.start]
        value_R, gradient_RC = self.targets.losses_and_gradient(common_RC, part, self.divergence, vocabulary)
        losses_R = self.divergence.scale * value_R * weights_R
        if share:
            of_tokens = self.tokens if self.rows is None else self.tokens.of_rows(self.rows)
            losses_R = losses_R + share * of_tokens.in_torch_(logits_RV, part, multiplier)
            logits_RV.mul_(share)
        else:
            logits_RV.zero_()
        # The logits were divided by the temperature: one of its two factors is spent on that.
        each_R = (self.divergence.scale / self.divergence.temperature * multiplier) * weights_R
        common_RC += gradient_RC.mul_(each_R[:, None])
        return losses_R
