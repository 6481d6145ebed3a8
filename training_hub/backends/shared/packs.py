"""How a recipe's rows become batches, and what is told of them, whichever engine trains on them."""

from __future__ import annotations

import time
from typing import Any

from training_hub.data.feed import Feed, FeedSettings
from training_hub.data.forecast import forecast, length_quantiles
from training_hub.data.prepare import Prepared
from training_hub.data.templates import ChatTemplate
from training_hub.monitoring.throughput import ThroughputMeter
from training_hub.recipe import Recipe
from training_hub.types import Batch, StepReport


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


def planned(recipe: Recipe, prepared: Prepared, template: ChatTemplate | None, feed: Feed) -> dict[str, Any]:
    """What the plan of a run says of its rows, packs and steps."""
    store, validation = prepared.train, prepared.validation
    return {
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained_tokens.sum()),
        "longest_sample": int(store.lengths.max()),
        "lengths": {**length_quantiles(store), "max_seq_len": recipe.training.max_seq_len},
        "validation_samples": len(validation) if validation is not None else 0,
        "samples_per_epoch": feed.samples_per_epoch,
        "samples_per_step": feed.settings.samples_per_step,
        "steps_per_epoch": feed.steps_per_epoch,
        "total_steps": feed.total_steps,
        "tokens_per_pack": feed.settings.token_budget,
        "packed": feed.settings.is_packed,
        "run": forecast(feed),
        "chat_template": template.name if template else None,
        "data": prepared.report,
    }


def reported(batch: Batch, meter: ThroughputMeter, total_steps: int, seconds: float, **found: Any) -> StepReport:
    """The report of a step that took so many seconds, which the meter learns. found: what the engine found in it."""
    meter.add(batch.num_tokens, seconds)
    return StepReport(
        step=batch.step,
        total_steps=total_steps,
        epoch=batch.epoch,
        tokens=batch.num_tokens,
        trained_tokens=batch.num_trained_tokens,
        samples=batch.num_samples,
        tokens_per_second=batch.num_tokens / seconds,
        step_seconds=seconds,
        seconds_left=meter.seconds_left,
        time=time.time(),
        **found,
    )
