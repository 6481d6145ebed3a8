"""AdaLoRA's part in a step: PEFT's allocator takes ranks from matrices that need them least, until a budget is met.

What is added to a weight is B diag(e) A, where A and B are held near orthogonal matrices by a term of the loss, and
numbers of e are set to 0 by their importance. Source: Zhang et al. 2023, arXiv:2303.10512.
"""

# A [r, in], B [out, r], e [r, 1]

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.lora.files import ADAPTER
from training_hub.errors import RecipeError

ALLOCATED = "ADALORA"
"""PEFT's name for it."""

PREFIX = "adalora/"
"""Of what a checkpoint holds beside the adapter."""

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator (0.21) keeps of each weight: moving averages of its importance, and of how that varies."""


class Allocation:
    """The allocator of an attached adapter, and how far the run has come."""

    def __init__(self, peft_model: Any):
        self._model = peft_model.base_model
        self._config = peft_model.peft_config[ADAPTER]
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._step = 0
        for name, parameter in self._model.named_parameters():
            if _is(name, "ranknum"):  # a constant, which PEFT lets train where the model has no contents
                parameter.requires_grad_(False)

    def expect_steps(self, total: int) -> None:
        """The run will have so many steps. Raises RecipeError where that leaves none to take ranks in."""
        config = self._config
        if config.tinit >= total - config.tfinal:
            raise RecipeError(
                f"lora.options: tinit {config.tinit} and tfinal {config.tfinal} leave none of the run's {total} steps "
                "to take ranks in. Write smaller ones, or more training.steps."
            )
        if config.init_r <= config.target_r:
            raise RecipeError(
                f"lora.options: init_r {config.init_r}; allowed: more than the {config.target_r} of lora.r, which is "
                f"what is left on average. Write init_r: {-(-3 * config.target_r // 2)}."
            )
        config.total_step = total

    def gather(self) -> None:
        """Add the gradient of the term that keeps A and B orthogonal; of several processes each adds its share."""
        share = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        factors = list(self._factors())
        with torch.enable_grad():
            norms = [_distance(p @ p.T if _is(name, "lora_A") else p.T @ p) for name, p in factors]
            term = self._config.orth_reg_weight * torch.stack(norms).mean() / share
            found = torch.autograd.grad(term, [p for _, p in factors])
        for (_, parameter), gradient in zip(factors, found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def before_step(self) -> None:
        """Keep the gradients, by which importance is measured once the weights have moved."""
        self._gradients = [(p, p.grad) for p in self._model.parameters() if p.requires_grad]

    def after_step(self) -> None:
        """Measure importance, and set what is needed least to 0."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._step += 1
        self._model.update_and_allocate(self._step)
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._gradients = []
        if self._step < self._config.total_step - self._config.tfinal:
            self._config.rank_pattern = None  # not what is left in the end: until then whole matrices are written

    def mean_rank(self) -> Tensor:
        """How many numbers of e are not 0, on average over matrices."""
        counts = [p.count_nonzero() for name, p in self._model.named_parameters() if _is(name, "lora_E")]
        return torch.stack(counts).float().mean()

    def saved(self) -> dict[str, Tensor]:
        """All that decides how ranks are shared out from here on."""
        kept = {
            f"{PREFIX}{average}/{name}": value
            for average in AVERAGES
            for name, value in getattr(self._model.rankallocator, average).items()
        }
        pattern = {f"{PREFIX}rank/{name}": torch.tensor(row) for name, row in (self._config.rank_pattern or {}).items()}
        return {**kept, **pattern, f"{PREFIX}step": torch.tensor(self._step)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave."""
        device = next(self._model.parameters()).device
        for average in AVERAGES:
            setattr(
                self._model.rankallocator,
                average,
                {name: value.to(device) for name, value in _under(tensors, f"{PREFIX}{average}/")},
            )
        self._model.rankallocator.ipt = dict.fromkeys(self._model.rankallocator.exp_avg_ipt)
        self._config.rank_pattern = {name: row.tolist() for name, row in _under(tensors, f"{PREFIX}rank/")} or None
        self._step = int(tensors[f"{PREFIX}step"])

    def _factors(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p) for n, p in self._model.named_parameters() if _is(n, "lora_A") or _is(n, "lora_B"))


def _is(name: str, kind: str) -> bool:
    return name.endswith(f".{kind}.{ADAPTER}")


def _distance(square: Tensor) -> Tensor:
    """From the identity."""
    return torch.linalg.matrix_norm(square - torch.eye(len(square), dtype=square.dtype, device=square.device))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((key.removeprefix(prefix), value) for key, value in tensors.items() if key.startswith(prefix))
