"""How far apart two distributions are, and the gradient of that by the logits of the second.

    forward_kl       KL(p, q) = sum of p (log p - log q)
    reverse_kl       KL(q, p)
    jensen_shannon   beta KL(p, m) + (1 - beta) KL(q, m),  m = beta p + (1 - beta) q

The last is the generalised divergence of Agarwal et al. 2023, arXiv:2306.13649, section 2.
"""

# N trained positions, V entries: tokens, or a few tokens and one entry for all others

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training_hub.recipe.distillation import Distillation

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
"""In the order in which kernels.c numbers them."""

Summed = Callable[..., Sequence[Tensor]]
"""Sums over all entries, from sums [N] over those that are here."""


def _as_they_are(*sums_N: Tensor) -> Sequence[Tensor]:
    return sums_N


@dataclass(frozen=True)
class Divergence:
    """A divergence D of a teacher p from a student q, whose part in a token's loss is alpha * temperature^2 * D, with
    both models' logits divided by `temperature`; the other part is (1 - alpha) * cross-entropy."""

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 1.0

    @staticmethod
    def of(settings: Distillation) -> Divergence:
        return Divergence(settings.divergence, settings.beta, settings.temperature, settings.alpha)

    @property
    def scale(self) -> float:
        """What D is multiplied by in the loss."""
        return self.alpha * self.temperature**2

    def value(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """D [N], by operators that autograd can differentiate."""
        if self.kind == "forward_kl":
            return _mean_of(log_p_NV, log_p_NV - log_q_NV)
        if self.kind == "reverse_kl":
            return _mean_of(log_q_NV, log_q_NV - log_p_NV)
        log_m_NV = torch.log(self.beta * log_p_NV.exp() + (1 - self.beta) * log_q_NV.exp())
        to_teacher_N = _mean_of(log_p_NV, log_p_NV - log_m_NV)
        return self.beta * to_teacher_N + (1 - self.beta) * _mean_of(log_q_NV, log_q_NV - log_m_NV)

    def with_gradient(self, log_p_NV: Tensor, log_q_NV: Tensor, summed: Summed = _as_they_are) -> tuple[Tensor, Tensor]:
        """D [N], and its gradient [N, V] by the logits of q, divided by the temperature already.

        summed: what makes sums over the entries that are here into sums over all, where some are elsewhere.

        With r = log q - log p, or log q - log m: the gradient of KL(q, .) is q (r - sum of q r), whatever p and m are,
        as m moves with q by (1 - beta) and the two parts in which it stands cancel.
        """
        q_NV = log_q_NV.exp()
        if self.kind == "forward_kl":
            (value_N,) = summed(self.value(log_p_NV, log_q_NV))
            return value_N, q_NV.sub_(log_p_NV.exp())
        log_other_NV = log_p_NV
        if self.kind == "jensen_shannon":
            log_other_NV = torch.log(self.beta * log_p_NV.exp() + (1 - self.beta) * q_NV)
        rise_NV = log_q_NV - log_other_NV
        means = [torch.where(q_NV > 0, q_NV * rise_NV, 0).sum(-1)]
        if self.kind == "jensen_shannon":
            means.append(_mean_of(log_p_NV, log_p_NV - log_other_NV))
        mean_N, *to_teacher = summed(*means)
        gradient_NV = q_NV.mul_(rise_NV.sub_(mean_N[:, None]))
        if self.kind == "reverse_kl":
            return mean_N, gradient_NV
        return self.beta * to_teacher[0] + (1 - self.beta) * mean_N, gradient_NV.mul_(1 - self.beta)


def _mean_of(log_weights_NV: Tensor, values_NV: Tensor) -> Tensor:
    """Sum of e^log_weights * values; what has no weight counts for nothing, even where its value is infinite."""
    weights_NV = log_weights_NV.exp()
    return torch.where(weights_NV > 0, weights_NV * values_NV, 0).sum(-1)
