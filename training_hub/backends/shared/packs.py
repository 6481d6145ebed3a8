"""How a recipe's rows become batches, whichever engine trains on them."""

from __future__ import annotations

from training_hub.data.feed import FeedSettings
from training_hub.recipe import Recipe


def settings_of(recipe: Recipe, longest: int, preferred: int, is_packed: bool) -> FeedSettings:
    """The settings of the feed. longest: tokens of the longest sample; preferred: tokens per pack that keep the device
    busy, of which more only cost memory. The recipe's max_tokens_per_gpu is a bound."""
    bound = recipe.training.max_tokens_per_gpu or max(preferred, recipe.training.max_seq_len)
    return FeedSettings(
        samples_per_step=recipe.training.global_batch_size,
        token_budget=max(longest, min(bound, preferred)),
        seed=recipe.seed,
        epochs=recipe.training.epochs,
        steps=recipe.training.steps,
        is_shuffled=recipe.data.shuffle,
        is_packed=is_packed,
    )
