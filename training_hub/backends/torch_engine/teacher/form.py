"""What is kept of a teacher's word: its likeliest tokens, or tokens drawn from it."""

# N trained positions, R rows of one chunk, C tokens that both vocabularies have, K tokens kept

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training_hub.backends.torch_engine.objectives.head import chunk_rows
from training_hub.backends.torch_engine.objectives.targets import DrawnTargets, Targets, TopTargets, WholeTargets
from training_hub.recipe.distillation import Distillation


@dataclass(frozen=True)
class Form:
    """What is kept of a teacher's distribution over C tokens, for each trained one: the K likeliest, or K drawn."""

    kind: str
    width: int
    common: int
    temperature: float
    seed: int

    @staticmethod
    def of(settings: Distillation, common: int, seed: int) -> Form:
        width = min(settings.top_k, common) if settings.cache == "top_k" else settings.samples
        return Form(settings.cache, width, common, settings.temperature, seed)

    @property
    def bytes_per_row(self) -> int:
        return self.width * (8 if self.kind == "top_k" else 4) + 4

    def targets(self, ids_NK: Tensor, logs_NK: Tensor | None, last_N: Tensor) -> Targets:
        """The targets that the objective takes, from what is kept."""
        if logs_NK is None:
            return DrawnTargets(ids_NK.long(), last_N, self.common)
        return TopTargets(ids_NK.long(), logs_NK, last_N if self.width < self.common else None, self.common)

    def kept(self, whole: WholeTargets, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor]:
        """ids [N, K], logs [N, K] or None, last [N], from the teacher's logits of `rows` tokens, chunk by chunk."""
        size = chunk_rows(self.common, generator.device.type)
        chunks = [
            self._chunk(whole.logits(slice(start, start + size)), generator) for start in range(0, max(rows, 1), size)
        ]
        ids, logs, last = zip(*chunks, strict=True)
        return torch.cat(ids), torch.cat(logs) if self.kind == "top_k" else None, torch.cat(last)

    def _chunk(self, logits_RC: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        log_p_RC = torch.log_softmax(logits_RC / self.temperature, -1)
        if self.kind == "top_k":
            logs_RK, ids_RK = log_p_RC.topk(self.width, -1)
            tails_R = log_p_RC.exp_().scatter_(-1, ids_RK, 0.0).sum(-1)
            return ids_RK, logs_RK, tails_R
        p_RC = log_p_RC.exp()
        if not len(p_RC):
            return p_RC.new_empty(0, self.width, dtype=torch.int64), p_RC, p_RC.new_empty(0)
        drawn_RK = torch.multinomial(p_RC, self.width, replacement=True, generator=generator)
        return drawn_RK, log_p_RC[:, :0], -torch.where(p_RC > 0, p_RC * log_p_RC, 0).sum(-1)
