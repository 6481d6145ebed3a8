"""`run_actor`: from setup to cleanup; again, from the newest checkpoint, where a process is lost on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from training_hub.algorithms import engine_of
from training_hub.backends import Several, find_backend
from training_hub.errors import LaunchError, RecipeError
from training_hub.launch import from_json
from training_hub.launch.actors.calls import Lost
from training_hub.launch.actors.trainer import Actor, TrainerActor
from training_hub.launch.layout import Layout, layout_of
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.load import build, dump, load_file
from training_hub.types import TrainResult

Launcher = Literal["processes", "monarch"]
Config = Recipe | Mapping[str, Any] | str | os.PathLike[str]

CALLS = ("setup", "train", "evaluate", "cleanup")


class Mesh(Protocol):
    """Actors in processes of their own."""

    async def start(self) -> None: ...

    async def call(self, name: str) -> list[Any]: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class ActorRun:
    """What became of the actors. result: of the run, where `train` gave one as TrainerActor's does. evaluation: what
    `evaluate` of the first gave. values: what each call gave, by rank. restarts: how often processes were lost."""

    result: TrainResult | None
    evaluation: Any
    values: dict[str, list[Any]] = field(default_factory=dict)
    restarts: int = 0


async def run_actor(
    actor: type[Actor] = TrainerActor,
    config: Config | None = None,
    *,
    launcher: Launcher = "processes",
    max_restarts: int = 3,
) -> ActorRun:
    """Make an actor in each process of the run, and call setup, train, evaluate and cleanup on all of them.

    actor: a class that other processes can import. config: a Recipe, a dictionary of settings, or the path of a YAML
    file. launcher: processes of our own, or Monarch. Where a process is lost (killed, or out of memory) all are started
    again, at most max_restarts times, and training goes on from the newest checkpoint.
    Raises an error of an actor's own as it is; LaunchError where processes are lost more often.
    """
    recipe = recipe_of(config)
    layout, path = layout_on_this_node(recipe), path_of(actor)
    console = open_console(recipe.monitoring.console)
    for restarts in range(max_restarts + 1):
        mesh = mesh_of(launcher)(layout, path, dump(recipe), RunFolder(Path(recipe.output)))
        try:
            await mesh.start()
            values = {name: await mesh.call(name) for name in CALLS}
            return ActorRun(result_of(values["train"][0]), values["evaluate"][0], values, restarts)
        except Lost as error:
            if restarts == max_restarts:
                raise LaunchError(
                    [*error.problems, f"Processes were lost {restarts + 1} times; that is all."]
                ) from error
            newest = RunFolder(Path(recipe.output)).newest_checkpoint() or "the beginning"
            console.say(
                f"actors: {error.problems[0]}; all start again, from {newest} ({restarts + 1} of {max_restarts})"
            )
            going_on = recipe.checkpoint.model_copy(update={"resume": "auto"})
            recipe = recipe.model_copy(update={"checkpoint": going_on})
        finally:
            await mesh.stop()
    raise AssertionError("the last round returns or raises")


def recipe_of(config: Config | None) -> Recipe:
    """The recipe that the caller names, holds or spells out. Raises RecipeError."""
    if isinstance(config, Recipe):
        return config
    if isinstance(config, Mapping):
        return build(config, required=("model.path", "data.path"))
    if config is None:
        raise RecipeError("config: not given; write run_actor(TrainerActor, 'run.yaml').")
    return load_file(Path(config))


def layout_on_this_node(recipe: Recipe) -> Layout:
    """The processes of the run. Raises RecipeError for one that needs more nodes than this."""
    engine = find_backend(engine_of(recipe))
    layout = layout_of(recipe, {}, engine.num_devices if isinstance(engine, Several) else lambda: 1)
    if layout.nodes > 1:
        raise RecipeError(
            f"processes.nodes: found {layout.nodes}; run_actor starts actors on this node alone. For several nodes use "
            "`training-hub slurm submit`, or start `training-hub sft` on each."
        )
    return replace(layout, run_id="actors")


def path_of(actor: type[Actor]) -> str:
    """The name under which another process finds the class. Raises RecipeError where it cannot."""
    if actor.__module__ == "__main__" or "<locals>" in actor.__qualname__:
        raise RecipeError(
            f"actor: {actor.__qualname__} is defined in {actor.__module__}, where other processes cannot import it. "
            "Put it into a module, at the top."
        )
    return f"{actor.__module__}:{actor.__qualname__}"


def mesh_of(launcher: str) -> Any:
    """The kind of mesh. Raises RecipeError for one that is not known, LaunchError for one that is not installed."""
    if launcher == "processes":
        from training_hub.launch.actors.processes import ProcessMesh

        return ProcessMesh
    if launcher != "monarch":
        raise RecipeError(f"launcher: found {launcher!r}; allowed: processes, monarch.")
    try:
        from training_hub.launch.actors.monarch import MonarchMesh
    except ImportError as error:
        raise LaunchError(
            f"monarch is not installed ({error}): pip install 'training-hub[monarch]', or write launcher='processes'."
        ) from error
    return MonarchMesh


def result_of(value: Any) -> TrainResult | None:
    """The result in what `train` gave; None where an actor of the caller's gave something else."""
    if not isinstance(value, dict) or "output_dir" not in value:
        return None
    return replace(from_json(value), status=value["status"])
