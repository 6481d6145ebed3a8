"""The plan of a run of the jax engine, as plain JSON under the names that the torch engine's has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array

from training_hub.backends.jax_engine.beforehand import STATES
from training_hub.backends.jax_engine.build import Machine
from training_hub.backends.jax_engine.materials import Materials
from training_hub.data.feed import Feed
from training_hub.data.forecast import forecast, length_quantiles
from training_hub.recipe import Recipe


def describe(
    recipe: Recipe,
    materials: Materials,
    feed: Feed,
    machine: Machine,
    trained: Mapping[str, Array],
    parameters: int,
    how: str,
    save_dtype: str,
    layout: Mapping[str, Any],
) -> dict[str, Any]:
    """The plan. how: what layers forget; layout: of the devices."""
    store, validation = materials.prepared.train, materials.prepared.validation
    numbers = sum(weight.size for weight in trained.values())
    memory = {
        "weights": 4 * parameters / 2**30,
        "gradients": 4 * numbers / 2**30,
        "optimizer": 4 * numbers * STATES[recipe.optimizer.name] / 2**30,
    }
    return {
        "algorithm": recipe.algorithm,
        "engine": "jax",
        "device": machine.platform,
        "devices": dict(layout),
        "processes": 1,
        "dtype": machine.dtype,
        "save_dtype": save_dtype,
        "parameters": parameters,
        "trained_parameters": numbers,
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
        "activation_checkpointing": how,
        "memory_gib": {**memory, "total": sum(memory.values())},
        "chat_template": materials.template.name if materials.template else None,
        "data": materials.prepared.report,
    }


def summary(plan: Mapping[str, Any]) -> str:
    """The plan in one line."""
    share = plan["trained_tokens"] / max(1, plan["tokens"])
    how = plan["activation_checkpointing"]
    return (
        f"plan: {plan['total_steps']:,} steps over {plan['samples']:,} samples, {plan['tokens']:,} tokens "
        f"({share:.0%} trained); {plan['trained_parameters']:,} of {plan['parameters']:,} parameters, "
        f"{plan['dtype']} by JAX on {plan['device']}, packs of {plan['tokens_per_pack']:,} tokens"
        + ("" if how == "none" else f", {how} activation checkpointing")
    )
