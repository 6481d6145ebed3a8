"""What is refused, before anything is loaded, of how a recipe lies over processes."""

from __future__ import annotations

import os

import torch

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.parallelism import degrees_of


def process_problems(recipe: Recipe) -> list[str]:
    """Why the processes that the recipe asks for cannot be had here, or its degrees do not fit them."""
    procs, there = recipe.processes.procs, torch.cuda.device_count()
    found = []
    if not isinstance(procs, str) and procs > max(1, there) and there:
        found.append(
            f"processes.procs: found {procs}; each process takes a GPU of its own, and this node has {there}. Write "
            f"processes.procs: {there} (nproc_per_node={there}), or gpu."
        )
    try:
        degrees = degrees_of(recipe.parallelism, world_size_of(recipe))
    except RecipeError as error:
        return [*found, *error.problems]
    if degrees.is_divided:
        found.append("parallelism.data_parallel_shard_degree: models are not divided yet. Write 1.")
    return found


def world_size_of(recipe: Recipe) -> int:
    """How many processes the run has: as the environment says where this is one of them, else as the recipe asks."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    procs = recipe.processes.procs
    local = procs if isinstance(procs, int) else max(1, torch.cuda.device_count())
    return local * recipe.processes.nodes
