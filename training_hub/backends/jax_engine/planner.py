"""The plan of a run before the run: from its data and the shapes of its model, without weights."""

from __future__ import annotations

from typing import Any

import jax

from training_hub.backends import Given
from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.build import keep_programs, machine_of, programs
from training_hub.backends.jax_engine.export import format_of
from training_hub.backends.jax_engine.full import Adaptation
from training_hub.backends.jax_engine.materials import Materials, load_materials
from training_hub.backends.jax_engine.mesh import Mesh, mesh_of
from training_hub.backends.jax_engine.plan import describe
from training_hub.backends.jax_engine.session import adaptation_of, feed_of
from training_hub.backends.jax_engine.table import leaves
from training_hub.backends.jax_engine.work import time_of_products
from training_hub.recipe import Recipe
from training_hub.types import Console

Specs = dict[str, jax.ShapeDtypeStruct]
"""Arrays that are not there: shape, format, and where they would lie."""


def plan(recipe: Recipe, console: Console, *, measures: bool) -> dict[str, Any]:
    """The plan of a run of `recipe` on this machine, as its plan.json says it. Its step is compiled, not run.

    measures: also time a matrix product, and say as `time` how long the run takes at least.
    """
    materials = load_materials(recipe, Given(), console, with_weights=False)
    keep_programs(recipe)
    machine = machine_of(recipe)
    feed = feed_of(recipe, materials, machine)
    adaptation = adaptation_of(recipe, materials, machine, console)
    mesh = mesh_of(recipe.parallelism, materials.shape)
    formats = formats_of(materials)
    halves = specs_of(adaptation, mesh, formats)
    console.say(f"plan: compiling a step on {machine.platform}, to see what it takes")
    made = programs(recipe, materials, machine, mesh, feed, adaptation, halves, console)
    held, save_dtype = {**halves[0], **halves[1]}, format_of(recipe, adaptation, formats)
    found = describe(recipe, materials, feed, machine, adaptation, mesh, made, held, save_dtype)
    if measures:
        found["time"] = time_of_products(materials.shape, adaptation.shapes(), found["run"], machine)
    return found


def formats_of(materials: Materials) -> dict[str, str]:
    """The format in which each weight lies in the model's files; where these are not there, what its config says."""
    found = files.formats(materials.source, materials.shape)
    if found:
        return found
    said = str(getattr(materials.config, "dtype", None) or "float32").removeprefix("torch.")
    return {key: said for key, _ in leaves(materials.shape)}


def specs_of(adaptation: Adaptation, mesh: Mesh, formats: dict[str, str]) -> tuple[Specs, Specs]:
    """What trains and what stays, as arrays that are not there."""

    def spec(name: str, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, files.number_format(dtype), sharding=mesh.sharding(name))

    trained = {name: spec(name, shape, "float32") for name, shape in adaptation.shapes().items()}
    return trained, {name: spec(name, *one) for name, one in adaptation.staying(formats).items()}
