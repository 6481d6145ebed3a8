"""Two optimizers that are one to whoever calls them: each moves its own groups, in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Both(torch.optim.Optimizer):
    """Optimizers over groups of their own, with one list of groups and one state."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self._optimizers = tuple(optimizers)
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        for one in self._optimizers:
            one.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of all; torch makes new groups and a new state for it."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for one in self._optimizers:
            one.param_groups = [next(groups) for _ in one.param_groups]
            one.state = self.state
