"""Starting a run: settle what the output folder holds, ask the engine, run, keep the result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from training_hub.algorithms import engine_of
from training_hub.backends import Given, find_backend
from training_hub.errors import CheckpointError, HubError, Interrupted, RecipeError
from training_hub.folders import write_json
from training_hub.monitoring.console import open_console
from training_hub.monitoring.report import write_report
from training_hub.monitoring.settings import public_settings
from training_hub.monitoring.watchers import objections as watcher_objections
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder, differences, write_recipe
from training_hub.types import TrainResult

FINISHED = "finished"


def run(recipe: Recipe, given: Given | None = None) -> TrainResult:
    """Run `recipe` in this process and return its result; errors of the run are raised as they are.

    An unfinished run of the same recipe in the output folder goes on; a finished one is returned as it is. Raises
    RecipeError listing every objection, before anything is loaded.
    """
    given = given or Given()
    engine = find_backend(engine_of(recipe))
    objections = [*watcher_objections(recipe), *engine.objections(recipe)]
    if objections:
        raise RecipeError(objections)
    folder = RunFolder(Path(recipe.output))
    console = open_console(recipe.monitoring.console)
    if recipe.checkpoint.resume == "restart" and folder.recipe.exists():
        console.say(f"output: what {folder.path} held is now in {folder.move_aside()}")
    with folder.claimed():
        earlier = settle(folder, recipe)
        if earlier is not None:
            console.say(f"output: {folder.path} holds this run, finished; to run it again: checkpoint.resume: restart")
            return earlier
        write_recipe(folder, recipe)
        try:
            result = engine.train(recipe, given)
        except Exception as error:
            write_json(folder.result, failure(error))
            raise
        write_json(folder.result, as_json(result))
        write_report(folder.path, result.history, {"settings": public_settings(recipe), **as_json(result)})
        return result


def settle(folder: RunFolder, recipe: Recipe) -> TrainResult | None:
    """The result of this very run if the folder holds it, None where there is something to do.

    Raises CheckpointError, field by field, where the folder holds another run that would be lost or mixed up.
    """
    before = folder.earlier_recipe()
    if before is None:
        if folder.has_checkpoints() or folder.final.exists():
            raise CheckpointError(
                f"{folder.path} holds checkpoints or a final model but no recipe.yaml, so it cannot be told whose they "
                "are. Name another output, or set checkpoint.resume: restart."
            )
        return None
    result = folder.earlier_result() or {}
    is_finished = result.get("status") == FINISHED
    if not is_finished and not folder.has_checkpoints():
        return None  # it never came to anything worth keeping, so the new recipe takes its place
    changed = differences(before, recipe)
    if changed or recipe.checkpoint.resume == "never":
        what = "a finished run" if is_finished else "an unfinished run"
        problem = f"{folder.path} holds {what}" + (" of a different recipe:" if changed else ".")
        remedy = "Name another output, or set checkpoint.resume: restart to move that run aside and begin anew."
        raise CheckpointError([problem, *changed, remedy])
    return from_json(result) if is_finished else None


def as_json(result: TrainResult) -> dict[str, Any]:
    """The result as plain JSON; the history stays in metrics.jsonl."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "history"}
    return json.loads(json.dumps(fields, default=str))


def from_json(content: dict[str, Any]) -> TrainResult:
    """The result that `as_json` wrote, with its history read again."""
    from training_hub.monitoring.jsonl import read_metrics

    output = Path(content["output_dir"])
    return TrainResult(
        **{
            **content,
            "status": "already finished",
            "output_dir": output,
            "model_path": Path(content["model_path"]) if content["model_path"] else None,
            "checkpoints": tuple(Path(path) for path in content["checkpoints"]),
            "history": tuple(read_metrics(RunFolder(output).metrics)),
        }
    )


def failure(error: Exception) -> dict[str, Any]:
    """What result.json says of a run that stopped."""
    return {
        "status": "interrupted" if isinstance(error, Interrupted) else "failed",
        "error": type(error).__name__,
        "problems": error.problems if isinstance(error, HubError) else [str(error)],
        "exit_code": error.exit_code if isinstance(error, HubError) else 1,
    }
