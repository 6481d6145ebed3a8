"""Cross-entropy over a vocabulary that is split over ranks: each has the logits of its own tokens, and no rank all."""

# R rows of one chunk, V tokens of the vocabulary that are here

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training_hub.backends.torch_engine.layouts.shared import Rows
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion


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
