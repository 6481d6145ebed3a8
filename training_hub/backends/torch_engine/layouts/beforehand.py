"""What is refused, before anything is loaded, of how a recipe lies over processes."""

from __future__ import annotations

import os

import torch

from training_hub.backends.torch_engine.layouts.fitness import way_problems
from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.parallelism import FIELDS, Degrees, degrees_of


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
        found += [*divided_problems(recipe, degrees), *way_problems(recipe, degrees)]
    return found


def divided_problems(recipe: Recipe, degrees: Degrees) -> list[str]:
    """Why this recipe cannot train a model that is divided over processes."""
    ways = [name for name in ("dp_shard", "cp", "tp", "pp") if getattr(degrees, name) > 1]
    whole = f"Write {' and '.join(f'parallelism.{FIELDS[name]}: 1' for name in ways)}, or"
    refused = {
        f"training.fp8: 8-bit products need whole weights. {whole} training.fp8: false.": recipe.training.fp8,
        "parallelism.enable_cpu_offload: there is no GPU here whose memory it could spare. Leave it "
        "out.": recipe.parallelism.enable_cpu_offload and not torch.cuda.is_available(),
    }
    return [problem for problem, is_so in refused.items() if is_so]


def world_size_of(recipe: Recipe) -> int:
    """How many processes the run has: as the environment says where this is one of them, else as the recipe asks."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    procs = recipe.processes.procs
    local = procs if isinstance(procs, int) else max(1, torch.cuda.device_count())
    return local * recipe.processes.nodes
