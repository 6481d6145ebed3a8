"""What may move: each adaptation chooses or replaces the weights that train."""

from __future__ import annotations

from collections.abc import Callable

from training_hub.algorithms import find_algorithm
from training_hub.backends.torch_engine.adaptations.full import Full
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.adaptations.lora import problems as lora_problems
from training_hub.backends.torch_engine.adaptations.osft import Osft
from training_hub.backends.torch_engine.adaptations.protocol import Adaptation
from training_hub.backends.torch_engine.loading.rounding import problems as rounding_problems
from training_hub.recipe import Recipe

ADAPTATIONS: dict[str, Callable[[Recipe], Adaptation]] = {
    "full": lambda recipe: Full(recipe.freezing),
    "osft": Osft,
    "lora": Lora,
}
"""By name: recipe -> adaptation."""

PROBLEMS: dict[str, Callable[[Recipe], list[str]]] = {"lora": lora_problems}


def adaptation_problems(recipe: Recipe) -> list[str]:
    """Why the adaptation of the recipe's algorithm, or the rounding of what it adapts, cannot be had here; no weight is
    read."""
    find = PROBLEMS.get(find_algorithm(recipe.algorithm).adaptation)
    return [*rounding_problems(recipe.qat), *(find(recipe) if find else [])]
