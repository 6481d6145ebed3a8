"""An optimizer's state as tensors by name, and back, bit for bit.

Beside tensors an optimizer may keep plain numbers for a weight (`step`), numbers of a whole group (schedule-free: how
many steps, the sum of their weights) and, in GaLore, the projector of a matrix; all become tensors here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INTEGER, REAL = "#int", "#float"
"""Behind the name of what was a plain number."""

TABLES = "qmap"
"""Tables of codes in bitsandbytes; weights share them, and a file of safetensors holds no tensor twice."""

PROJECTOR = "projector"
OF_GROUP = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""What a schedule-free optimizer (schedulefree 1.4) keeps of a group from step to step."""


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state of one weight."""
    found = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[key] = value.clone() if key.startswith(TABLES) else value
        elif isinstance(value, int):
            found[key + INTEGER] = torch.tensor(value)
        elif isinstance(value, float):
            found[key + REAL] = torch.tensor(value, dtype=torch.float64)
        elif key == PROJECTOR:
            found[PROJECTOR] = value.ortho_matrix
    return found


def state_of(tensors: dict[str, Tensor], group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What `tensors_of` took apart, for a weight of `group` on `device`."""
    found: dict[str, Any] = {}
    for key, value in tensors.items():
        if key.endswith((INTEGER, REAL)):
            found[key.rpartition("#")[0]] = value.item()
        elif key == PROJECTOR:
            found[PROJECTOR] = _projector(value.to(device), group)
        else:
            found[key] = value
    return found


def numbers_of(groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What groups keep, by `@number/name`."""
    return {
        f"@{number}/{key}": torch.tensor(float(group[key]), dtype=torch.float64)
        for number, group in enumerate(groups)
        for key in OF_GROUP
        if key in group
    }


def load_numbers(groups: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Take over what `numbers_of` gave."""
    for key, value in tensors.items():
        number, name = key.removeprefix("@").split("/")
        group = groups[int(number)]
        group[name] = type(group[name])(value.item())


def _projector(matrix: Tensor, group: dict[str, Any]) -> Any:
    from galore_torch.galore_projector import GaLoreProjector

    made = GaLoreProjector(
        group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"], proj_type=group["proj_type"]
    )
    made.ortho_matrix = matrix
    return made
