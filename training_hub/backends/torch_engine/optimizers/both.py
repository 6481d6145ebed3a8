"""Several optimizers that are one to whoever calls them: each moves its own groups, in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class Both(torch.optim.Optimizer):
    """Optimizers over groups of their own, with one list of groups and one state.

    turns: gives the optimizers that make a step, in order, and goes on when each has made its own; all by default.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        turns: Callable[[], Iterator[torch.optim.Optimizer]] | None = None,
    ):
        self.parts: tuple[torch.optim.Optimizer, ...] = tuple(
            part for one in optimizers for part in (one.parts if isinstance(one, Both) else (one,))
        )
        self._turns = turns or (lambda: iter(self.parts))
        # torch wants a group, but of several processes one may have nothing to move.
        super().__init__([group for one in self.parts for group in one.param_groups] or [{"params": []}], {})
        for one in self.parts:
            self.state.update(one.state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        for one in self._turns():
            one.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of all, each as it takes over its own."""
        groups, first = iter(state_dict["param_groups"]), 0
        kept: dict[torch.Tensor, Any] = {}
        for one in self.parts:
            own = [dict(next(groups)) for _ in one.param_groups]
            count = sum(len(group["params"]) for group in own)
            numbers = range(first, first + count)
            for group in own:
                group["params"] = [number - first for number in group["params"]]
            state = {number - first: state_dict["state"][number] for number in numbers if number in state_dict["state"]}
            weights = {weight for group in one.param_groups for weight in group["params"]}
            one.state = type(self.state)(dict, {weight: self.state[weight] for weight in weights & self.state.keys()})
            one.load_state_dict({"state": state, "param_groups": own})
            kept.update(one.state)
            first += count
        self.param_groups = [group for one in self.parts for group in one.param_groups] or self.param_groups
        self.state.clear()
        self.state.update(kept)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for one in self.parts:
            one.param_groups = [next(groups) for _ in one.param_groups]
            one.state = self.state
