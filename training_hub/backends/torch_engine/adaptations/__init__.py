"""What may move: each adaptation chooses or replaces the weights that train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training_hub.backends.torch_engine.adaptations.full import Full
from training_hub.recipe import Recipe

ADAPTATIONS: dict[str, Callable[[Recipe], Any]] = {"full": lambda recipe: Full()}
"""By name: recipe -> adaptation."""
