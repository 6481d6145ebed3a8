"""What is learned: each objective makes a weighted sum of losses from a model and a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy

OBJECTIVES: dict[str, Callable[..., tuple[Any, str | None]]] = {"cross_entropy": cross_entropy}
"""By name: model -> (objective, a note for the user or None)."""
