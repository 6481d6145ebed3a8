"""The plan of a run of the jax engine, as plain JSON under the names that the torch engine's has."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.beforehand import count_of, kept_numbers
from training_hub.backends.jax_engine.build import Machine, Programs
from training_hub.backends.jax_engine.freezing import tables_of
from training_hub.backends.jax_engine.full import Adaptation
from training_hub.backends.jax_engine.materials import Materials
from training_hub.backends.jax_engine.mesh import Mesh
from training_hub.backends.shared.packs import planned
from training_hub.data.feed import Feed
from training_hub.recipe import Recipe

GIB = 2**30

LIBRARIES = {"cpu": int(0.5 * GIB)}
"""Bytes that a process holds with Python, JAX, transformers and a tokenizer loaded; an accelerator has none of them."""

UNKNOWN = "activations are not estimated: XLA tells nothing of the memory of its programs here"


def describe(
    recipe: Recipe,
    materials: Materials,
    feed: Feed,
    machine: Machine,
    adaptation: Adaptation,
    mesh: Mesh,
    programs: Programs,
    held: Mapping[str, Any],
    save_dtype: str,
    processes: int = 1,
) -> dict[str, Any]:
    """The plan. held: every weight, or its shape, format and place."""
    trained = adaptation.shapes()
    later = [name for _, names in adaptation.turns.turns for name in names]
    return {
        "algorithm": recipe.algorithm,
        "engine": "jax",
        "device": machine.platform,
        "devices": dict(mesh.layout),
        "processes": processes,
        "dtype": machine.dtype,
        "save_dtype": save_dtype,
        "parameters": files.count(materials.shape),
        "trained_parameters": sum(count_of(shape) for shape in trained.values()),
        "frozen_at_first": sum(count_of(trained[name]) for name in later),
        **planned(recipe, materials.prepared, materials.template, feed),
        "activation_checkpointing": programs.steps.forward.forget,
        "memory_gib": memory_of(recipe, materials, machine, adaptation, programs.temporary, held),
    }


def memory_of(
    recipe: Recipe,
    materials: Materials,
    machine: Machine,
    adaptation: Adaptation,
    temporary: int | None,
    held: Mapping[str, Any],
) -> dict[str, Any]:
    """GiB of one device by what takes them; `total` is the most that there is at once in a step.

    Weights, gradients and moments are counted. activations: all else that a step takes, a chunk of logits among it, as
    XLA plans it for the largest pack (`temporary`); None, and total without it, where XLA does not tell.
    """
    trained, tables = adaptation.shapes(), tables_of(materials.shape)
    shares = {name: _here(held[name]) / prod(trained[name]) for name in trained}
    kept = {name: kept_numbers(recipe.optimizer, {name: trained[name]}, tables) for name in trained}
    parts = {
        "libraries": LIBRARIES.get(machine.platform, 0),
        "weights": sum(_here(one) * one.dtype.itemsize for one in held.values()),
        "gradients": 4 * sum(_here(held[name]) for name in trained),
        "optimizer": 4 * sum(kept[name] * shares[name] for name in trained),
        "activations": temporary,
    }
    sizes = {name: None if part is None else part / GIB for name, part in parts.items()}
    total = sum(part for part in parts.values() if part is not None) / GIB
    return {**sizes, "total": total, "note": UNKNOWN if temporary is None else ""}


def _here(one: Any) -> int:
    """Numbers of a weight that one device holds."""
    return prod(one.sharding.shard_shape(one.shape))


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
