"""Saved models on rows: in this process, in several that are started, or as one of several that torchrun started."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from training_hub.algorithms import engine_of
from training_hub.backends import Examiner, Given, JointExaminer, OwnMetrics, Several, find_backend
from training_hub.errors import BackendError, RecipeError
from training_hub.evaluation.predictions import Sitting, read_sitting
from training_hub.folders import write_json
from training_hub.launch import laid_out, refuse_live
from training_hub.launch.layout import Layout, layout_of
from training_hub.launch.supervisor import Task, supervise
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console

EXAMINER = "training_hub.launch.examiner"
REMEDY = "Nothing was written. Run the same command again."


def examiner_for(recipe: Recipe) -> Examiner:
    """The engine of the recipe. Raises BackendError where that evaluates no models."""
    engine = find_backend(engine_of(recipe))
    if not isinstance(engine, Examiner):
        raise BackendError(
            f"backend {engine.name!r} evaluates no models: it has no method examine(recipe, given, console, own)."
        )
    return engine


def processes_for(recipe: Recipe) -> Layout:
    """The processes that are to ask saved models, by the recipe or the environment. Raises RecipeError where the engine
    cannot do it in several."""
    engine = examiner_for(recipe)
    layout = layout_of(recipe, os.environ, engine.num_devices) if isinstance(engine, Several) else Layout()
    if layout.world_size > 1 and not isinstance(engine, JointExaminer):
        raise RecipeError(
            f"processes.procs: {layout.world_size} processes, but backend {engine.name} lets saved models answer in "
            "one. Write processes.procs: 1 and start it without torchrun, or backend: torch."
        )
    return layout


def in_processes(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe as these processes have it."""
    return recipe if layout.is_rank else laid_out(recipe, layout)


def examine_all(
    layout: Layout,
    recipes: Sequence[Recipe],
    given: Given,
    console: Console,
    own: OwnMetrics = (),
    place: Path | None = None,
    stream: TextIO | None = None,
) -> list[Sitting]:
    """What the model of each recipe, which differ in nothing else, says to the rows, and its scores.

    place: folder for the logs of processes that are started; else they are kept where one fails. stream: where these
    speak. Errors of a process are raised as they are, with its rank and log. Raises RecipeError for live objects, which
    cannot travel.
    """
    engine = examiner_for(recipes[0])
    if layout.world_size == 1:
        return [engine.examine(one, given, console, own) for one in recipes]
    if layout.is_rank and isinstance(engine, JointExaminer):
        return engine.examine_together(recipes, given, console, own)
    refuse_live(replace(given, metrics=tuple(own)), layout)
    folder = place or Path(tempfile.mkdtemp(prefix="training-hub-evaluation-"))
    file = folder / "logs" / f"evaluation-node{layout.node_rank}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"folder": str(folder), "recipes": [one.model_dump(mode="json") for one in recipes]})
    content = supervise(layout, Task(file, EXAMINER, REMEDY, stream), RunFolder(folder))
    if place is None:
        shutil.rmtree(folder)
    return [read_sitting(one) for one in json.loads(content["sittings"])]
