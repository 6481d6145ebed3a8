"""AdaLoRA's part in a step: PEFT's allocator takes ranks from matrices that need them least, until a budget is met.

What is added to a weight is B diag(e) A, where A and B are held near orthogonal matrices by a term of the loss, and
numbers of e are set to 0 by their importance. Source: Zhang et al. 2023, arXiv:2303.10512.

Of a model in stages each process has the matrices of its layers. What the stages tell each other is the importance of
each rank: a number, once for each step in which ranks are taken.
"""

# A [r, in], B [out, r], e [r, 1], r ranks of a matrix

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.adaptations.lora.files import ADAPTER
from training_hub.backends.torch_engine.layouts.cut import Route, route_of
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
        self._route: Route | None = None
        self._ranks = {name: len(p) for name, p in self._model.model.named_parameters() if _is(name, "lora_E")}
        self._here: frozenset[str] = frozenset()
        for name, parameter in self._model.named_parameters():
            if _is(name, "ranknum"):  # a constant, which PEFT lets train where the model has no contents
                parameter.requires_grad_(False)

    def divided(self, model: Any) -> None:
        """The model may be in stages now, and then compares its ranks with those of the others."""
        self._route = route_of(model)
        self._here = frozenset(name for name, _ in self._model.model.named_parameters())
        if self._route is not None:
            self._model.rankallocator = _over_stages()(self._model.rankallocator, self._ranks, self._route)

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
        share //= self._route.group.size() if self._route is not None else 1
        factors = list(self._factors())
        if not factors:
            return
        with torch.enable_grad():
            norms = [_distance(p @ p.T if _is(name, "lora_A") else p.T @ p) for name, p in factors]
            mean = torch.stack(norms).sum() / (2 * len(self._ranks))
            term = self._config.orth_reg_weight * mean / share
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
        """How many numbers of e are not 0, on average over matrices, those of other stages among them."""
        counts = [p.count_nonzero() for name, p in self._model.named_parameters() if _is(name, "lora_E")]
        total = sum(counts, torch.zeros((), dtype=torch.int64, device=next(self._model.parameters()).device))
        if self._route is not None:
            dist.all_reduce(total, group=self._route.group)
        return total.float() / len(self._ranks)

    def resized(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter by the names in its file with what is left of each matrix, once that is known; the
        configuration then says the same of it."""
        if self._config.rank_pattern is None:
            return tensors
        end = f".{ADAPTER}"
        self._config.rank_pattern = {name.removesuffix(end): row for name, row in self._config.rank_pattern.items()}
        whole = {name + end: tensor for name, tensor in tensors.items()}
        left = self._model.resize_state_dict_by_rank_pattern(self._config.rank_pattern, whole, ADAPTER)
        return {name.removesuffix(end): tensor.contiguous() for name, tensor in left.items()}

    def saved(self) -> dict[str, Tensor]:
        """All that decides how ranks are shared out from here on. Of several stages the first process says what all
        have in common."""
        kept = {
            f"{PREFIX}{average}/{name}": value
            for average in AVERAGES
            for name, value in getattr(self._model.rankallocator, average).items()
        }
        if self._route is not None and self._route.place > 0:
            return kept
        pattern = {f"{PREFIX}rank/{name}": torch.tensor(row) for name, row in (self._config.rank_pattern or {}).items()}
        return {**kept, **pattern, f"{PREFIX}step": torch.tensor(self._step)}

    def is_here(self, key: str) -> bool:
        """Whether a tensor of a checkpoint is about a matrix of this process, or about all."""
        kind, _, name = key.removeprefix(PREFIX).partition("/")
        return kind not in AVERAGES or name in self._here

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


def _over_stages() -> Any:
    """The class of PEFT's allocator that compares ranks of all stages. PEFT is imported where it is used."""
    with library.quiet():
        from peft.tuners.adalora.layer import RankAllocator

    class OverStages(RankAllocator):
        def __init__(self, whole: Any, ranks: Mapping[str, int], route: Route):
            self.__dict__.update(vars(whole))
            self._ranks, self._route = ranks, route

        @torch.no_grad()
        def mask_to_budget(self, model: Any, budget: int) -> dict[str, list[bool]]:
            """Set what is needed least to 0, of this process's matrices; what is left of each of all."""
            own = {name: self._importance(name) for name, _ in model.named_parameters() if name in self._ranks}
            every = torch.zeros(sum(self._ranks.values()), dtype=torch.float64, device=self._route.device)
            places = dict(zip(self._ranks, every.split(list(self._ranks.values())), strict=True))
            for name, importance in own.items():
                places[name].copy_(importance)
            dist.all_reduce(every, group=self._route.group)
            least = torch.kthvalue(every, k=self.init_bgt - budget).values
            for name, parameter in model.named_parameters():
                if name in own:
                    parameter.masked_fill_((places[name] <= least)[:, None], 0.0)
            return {name: (~(row <= least)).tolist() for name, row in places.items()}

        def _importance(self, name: str) -> Tensor:
            """[r]: of each rank that of its number of e, and the means of those of its row of A and column of B."""
            of_e, of_a, of_b = (
                self._element_score(name.replace("lora_E", part)) for part in ("lora_E", "lora_A", "lora_B")
            )
            return of_e.view(-1) + (of_a.mean(1) + of_b.mean(0))

    return OverStages


def _is(name: str, kind: str) -> bool:
    return name.endswith(f".{kind}.{ADAPTER}")


def _distance(square: Tensor) -> Tensor:
    """From the identity."""
    return torch.linalg.matrix_norm(square - torch.eye(len(square), dtype=square.dtype, device=square.device))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((key.removeprefix(prefix), value) for key, value in tensors.items() if key.startswith(prefix))
