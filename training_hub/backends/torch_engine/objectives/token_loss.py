"""What is made of one token's logits: cross-entropy and what the section `loss` adds to it."""

# N trained positions, R rows of one chunk, V vocabulary, or tokens of it that are here

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused.functions import cross_entropy_, gpu_cross_entropy
from training_hub.backends.torch_engine.layouts.shared import Rows
from training_hub.recipe.loss import Loss


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a token t with logits z, where p = softmax(z) and Z = log(sum of e^z):

        share * ((1 - smoothing) * -log p(t) + smoothing * mean over v of -log p(v)) + z * Z^2

    share is 1, or with `dft` p(t) itself without a gradient (dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629).
    The square of Z is the z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """

    smoothing: float = 0.0
    z: float = 0.0
    dft: bool = False

    @staticmethod
    def of(settings: Loss) -> TokenLoss:
        return TokenLoss(settings.label_smoothing, settings.z_loss, settings.dft)

    def losses(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """[N], by torch's operators on whole logits, which autograd can differentiate."""
        normaliser_N = torch.logsumexp(logits_NV, -1)
        surprise_N = normaliser_N - logits_NV.gather(-1, targets_N[:, None])[:, 0]
        share = torch.exp(-surprise_N).detach() if self.dft else 1.0
        if self.smoothing:
            spread_N = normaliser_N - logits_NV.mean(-1)
            surprise_N = (1 - self.smoothing) * surprise_N + self.smoothing * spread_N
        loss_N = share * surprise_N
        return loss_N + self.z * normaliser_N**2 if self.z else loss_N


PLAIN = TokenLoss()


@dataclass(frozen=True)
class TokenCriterion:
    """The weighted losses of tokens, chunk by chunk of their logits, with the gradient formed beside them."""

    loss: TokenLoss
    targets_N: Tensor
    weights_N: Tensor

    has_kernel = True

    def of_rows(self, rows: Rows) -> SplitTokens:
        """The same where the vocabulary is split over ranks."""
        return SplitTokens(self, rows)

    def on_kernel_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor:
        """losses [R]; the logits, not yet multiplied, become the gradient of their sum."""
        targets_R, weights_R = self.targets_N[part], self.weights_N[part]
        return cross_entropy_(
            logits_RV, targets_R, weights_R.float(), multiplier, self.loss.smoothing, self.loss.z, self.loss.dft
        )

    def on_gpu(self, logits_RV: Tensor, part: slice, multiplier: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """losses [R], and the gradient of their sum as `dtype`; the logits, in float32 and not yet multiplied, stay."""
        targets_R, weights_R = self.targets_N[part], self.weights_N[part]
        return gpu_cross_entropy(
            logits_RV, targets_R, weights_R.float(), multiplier, dtype, self.loss.smoothing, self.loss.z, self.loss.dft
        )

    def in_torch_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor:
        """losses [R]; the logits, multiplied and capped, become the gradient of their sum times `multiplier`."""
        loss, chosen, weights_R = self.loss, self.targets_N[part][:, None], self.weights_N[part].to(logits_RV.dtype)
        normaliser_R = torch.logsumexp(logits_RV, -1)
        losses_R = normaliser_R - logits_RV.gather(-1, chosen)[:, 0]
        share_R = torch.exp(-losses_R) if loss.dft else torch.ones_like(losses_R)
        if loss.smoothing:
            losses_R = (1 - loss.smoothing) * losses_R + loss.smoothing * (normaliser_R - logits_RV.mean(-1))
        losses_R = share_R * losses_R + (loss.z * normaliser_R**2 if loss.z else 0)
        gradient_RV = logits_RV.sub_(normaliser_R[:, None]).exp_()
        if loss != PLAIN:
            gradient_RV.mul_((share_R + 2 * loss.z * normaliser_R)[:, None])
        if loss.smoothing:
            gradient_RV.sub_((share_R * (loss.smoothing / logits_RV.shape[-1]))[:, None])
        gradient_RV.scatter_add_(-1, chosen, (share_R * (loss.smoothing - 1))[:, None])
        gradient_RV.mul_((weights_R * multiplier)[:, None])
        return losses_R * weights_R


@dataclass(frozen=True)
class SplitTokens:
    """What `whole` is for all logits, for those of the tokens `rows`: the same losses on every rank, and the gradient
    by the logits that are here.

    Two exchanges for a chunk: of the largest logit of each row, and of three sums.
    """

    whole: TokenCriterion
    rows: Rows

    has_kernel = False

    def on_kernel_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor:
        """The same by torch's operators, of logits that are not yet multiplied."""
        return self.in_torch_(logits_RV.mul_(multiplier), part, multiplier)

    def in_torch_(self, logits_RV: Tensor, part: slice, multiplier: float) -> Tensor:
        """losses [R]; the logits, multiplied and capped, become the gradient of their sum times `multiplier`."""
        loss, targets_R = self.whole.loss, self.whole.targets_N[part]
        weights_R = self.whole.weights_N[part].to(logits_RV.dtype)
        is_here, chosen = self.rows.here(targets_R), self.rows.local(targets_R)[:, None]
        highest_R = self.rows.highest_(logits_RV.amax(-1))
        own_R = logits_RV.gather(-1, chosen)[:, 0].masked_fill(~is_here, 0)
        sums = torch.stack([(logits_RV - highest_R[:, None]).exp_().sum(-1), own_R, logits_RV.sum(-1)])
        masses_R, chosen_R, totals_R = self.rows.summed_(sums)
        normaliser_R = highest_R + masses_R.log()
        losses_R = normaliser_R - chosen_R
        share_R = torch.exp(-losses_R) if loss.dft else torch.ones_like(losses_R)
        if loss.smoothing:
            spread_R = normaliser_R - totals_R / self.rows.total
            losses_R = (1 - loss.smoothing) * losses_R + loss.smoothing * spread_R
        losses_R = share_R * losses_R + (loss.z * normaliser_R**2 if loss.z else 0)
        gradient_RV = logits_RV.sub_(normaliser_R[:, None]).exp_()
        if loss != PLAIN:
            gradient_RV.mul_((share_R + 2 * loss.z * normaliser_R)[:, None])
        if loss.smoothing:
            gradient_RV.sub_((share_R * (loss.smoothing / self.rows.total))[:, None])
        of_chosen_R = (share_R * (loss.smoothing - 1)).masked_fill(~is_here, 0)
        gradient_RV.scatter_add_(-1, chosen, of_chosen_R[:, None])
        gradient_RV.mul_((weights_R * multiplier)[:, None])
        return losses_R * weights_R
