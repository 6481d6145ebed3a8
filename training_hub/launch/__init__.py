"""Starting a run: settle what the output folder holds, run in one process or several, keep the result."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from training_hub.algorithms import engine_of
from training_hub.backends import Backend, Given, Several, find_backend
from training_hub.errors import CheckpointError, DiskError, HubError, Interrupted, RecipeError
from training_hub.folders import damage, tidy, write_json, write_text
from training_hub.launch import hub
from training_hub.launch.layout import Layout, layout_of
from training_hub.launch.stopping import Stop, interruption, stoppable
from training_hub.launch.supervisor import Task, supervise
from training_hub.monitoring.console import open_console
from training_hub.monitoring.report import write_report
from training_hub.monitoring.settings import public_settings
from training_hub.monitoring.watchers import objections as watcher_objections
from training_hub.recipe import Recipe
from training_hub.recipe.check import cautions
from training_hub.recipe.folder import RunFolder, differences, write_recipe
from training_hub.recipe.load import dump
from training_hub.types import Console, TrainResult

FINISHED, STOPPED, RUNNING = "finished", "stopped", "running"
LIMITS = ("watch_limit", "early_stopping_patience", "early_stopping_min_delta", "best_metric", "best_mode")
"""Settings of evaluation that may end a run early."""

Work = Callable[[Recipe, Given], TrainResult]
"""What trains: the engine here, or in processes that are started."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


def run(recipe: Recipe, given: Given | None = None) -> TrainResult:
    """Run `recipe` and return its result; errors of the run are raised as they are, also those of processes it starts.

    In this process; in several that are started, where the recipe or torchrun's environment asks for them; or as one of
    several that torchrun started. An unfinished run of the same recipe in the output folder goes on; a finished one is
    returned as it is. Raises RecipeError listing every objection, before anything is loaded.
    """
    stop = Stop()
    try:
        with stoppable(stop):
            return _start(recipe, given or Given(), stop)
    except KeyboardInterrupt as error:
        raise interruption(stop.number, RunFolder(Path(recipe.output)).newest_checkpoint()) from error


def willing_engine(recipe: Recipe, problems: Sequence[str] = ()) -> Backend:
    """The engine that runs the recipe. Raises RecipeError listing every objection, before anything is loaded.

    problems: what was found before, told with them.
    """
    engine = find_backend(engine_of(recipe))
    objections = [*problems, *watcher_objections(recipe), *engine.objections(recipe)]
    objections += [] if objections else hub.objections(recipe)  # which asks the network, so last
    if objections:
        raise RecipeError(objections)
    return engine


def _start(recipe: Recipe, given: Given, stop: Stop) -> TrainResult:
    layout = _layout(recipe)
    folder = RunFolder(Path(recipe.output))
    engine = find_backend(engine_of(recipe))
    console = open_console(recipe.monitoring.console if layout.is_first else "off")
    for line in cautions(recipe):
        console.say(f"recipe: {line}")
    work = engine.train
    if layout.world_size > 1 and not layout.is_rank:
        refuse_live(given, layout)
        work = partial(_in_processes, layout)
    if layout.is_first:
        return _run(recipe, given, work, folder, console, stop)
    # The first process keeps the folder; the others come to the same conclusions, and leave no trace.
    earlier = None if recipe.checkpoint.resume == "restart" else settle(folder, recipe)
    return earlier or work(recipe, given)


def _layout(recipe: Recipe) -> Layout:
    """The processes of the run, on which its engine agrees. Raises RecipeError listing every objection."""
    engine, layout, problems = find_backend(engine_of(recipe)), Layout(), []
    if isinstance(engine, Several):
        try:
            layout = layout_of(recipe, os.environ, engine.num_devices)
        except RecipeError as error:
            problems = error.problems
    is_laid_out = isinstance(engine, Several) and not (layout.is_rank or problems)
    willing_engine(laid_out(recipe, layout) if is_laid_out else recipe, problems)
    return layout


def is_first(recipe: Recipe) -> bool:
    """Whether this process is the one that speaks for the run, of all that were started on all nodes."""
    engine = find_backend(engine_of(recipe))
    return not isinstance(engine, Several) or layout_of(recipe, os.environ, engine.num_devices).is_first


def laid_out(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with the processes that the environment, which may have had the last word, gives it."""
    processes = recipe.processes.model_copy(update={"procs": layout.procs, "nodes": layout.nodes})
    return recipe.model_copy(update={"processes": processes})


def _in_processes(layout: Layout, recipe: Recipe, given: Given) -> TrainResult:
    """Run `recipe` in processes of this node, which read it from the run folder."""
    folder = RunFolder(Path(recipe.output))
    path = folder.recipe
    if layout.node_rank > 0:  # the first node writes the folder's own
        path = folder.path / "logs" / f"node{layout.node_rank}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump(recipe))
    content = supervise(layout, Task(path), folder)
    return replace(from_json(content), status=content["status"])


def refuse_live(given: Given, layout: Layout) -> None:
    """Raise RecipeError for live objects, which cannot travel to processes that are started for the run."""
    live = [name for name in ("model", "tokenizer", "rows", "validation_rows") if getattr(given, name) is not None]
    live += ["callbacks"] if given.watchers else []
    live += ["metrics"] if given.metrics else []
    if live:
        raise RecipeError(
            f"{', '.join(live)}: a live object stays in this process, and processes.procs, processes.nodes "
            f"(nproc_per_node, nnodes) start {layout.world_size} others. Save it to a file or folder and name that, or "
            "start this program itself with torchrun, in each process of which it then lives."
        )


def _run(recipe: Recipe, given: Given, work: Work, folder: RunFolder, console: Console, stop: Stop) -> TrainResult:
    if recipe.checkpoint.resume == "restart" and folder.recipe.exists():
        console.say(f"output: what {folder.path} held is now in {folder.move_aside()}")
    with folder.claimed():
        tidy(folder.path)
        earlier = settle(folder, recipe)
        if earlier is not None:
            console.say(f"output: {folder.path} holds this run, finished; to run it again: checkpoint.resume: restart")
            return pushed(earlier, recipe, folder, console)
        try:
            result = _train(recipe, given, work, folder, console, stop)
        except KeyboardInterrupt:  # raised in the engine, or while an error of the engine was being written down
            stop.is_over = True
            record(folder, failure(interruption(stop.number, folder.newest_checkpoint())), console)
            raise
        try:
            write_report(folder.path, result.history, {"settings": public_settings(recipe), **as_json(result)})
        except OSError as error:  # the model is there and whole: a missing page must not make the run a failed one
            console.say(f"report: {folder.path} got no report.html: {error}")
        return pushed(result, recipe, folder, console)


def pushed(result: TrainResult, recipe: Recipe, folder: RunFolder, console: Console) -> TrainResult:
    """The result with the address of its upload, where the recipe asks for one that has not been made yet."""
    if not recipe.hub.push or (result.hub and f"/{recipe.hub.repo_id}/" in result.hub):
        return result
    if result.model_path is None:
        console.say("hub: there is no final model, so nothing is uploaded")
        return result
    result = dataclasses.replace(result, hub=hub.push(result.model_path, recipe, console))
    status = FINISHED if result.status == "already finished" else result.status
    write_json(folder.result, as_json(dataclasses.replace(result, status=status)))
    return result


def _train(recipe: Recipe, given: Given, work: Work, folder: RunFolder, console: Console, stop: Stop) -> TrainResult:
    """Do the work, and write down in result.json how that ended; KeyboardInterrupt is the caller's to write down."""
    try:
        with out_of_room_explained(folder):
            write_recipe(folder, recipe)
            write_json(folder.result, {"status": RUNNING, "process": os.getpid(), "host": socket.gethostname()})
            result = work(recipe, given)
            stop.is_over = True  # what is left takes milliseconds
            write_json(folder.result, as_json(result))
            return result
    except Exception as error:
        stop.is_over = True
        record(folder, failure(error), console)
        raise


@contextmanager
def out_of_room_explained(folder: RunFolder) -> Iterator[None]:
    """Turn a disk that is full, gone or read-only into a DiskError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS and folder.path.is_dir():
            raise
        if not folder.path.is_dir():
            raise DiskError(f"output: {folder.path} is gone; it was there when the run began ({error}).") from error
        free = shutil.disk_usage(folder.path).free
        raise DiskError(
            f"output: {folder.path} cannot be written: {error}. {free:,} bytes are free there. Earlier checkpoints are "
            "as they were. Make room, and run the same command again to go on from the newest."
        ) from error


def record(folder: RunFolder, content: dict[str, Any], console: Console) -> None:
    """Write result.json of a run that stopped; where even that fails, say so and leave the run's own error standing."""
    try:
        write_json(folder.result, content)
    except OSError as error:
        console.say(f"output: {folder.result} could not be written: {error}")


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
    # A run that was stopped at a limit is over until it is given another one.
    is_over = all(getattr(before.evaluation, name) == getattr(recipe.evaluation, name) for name in LIMITS)
    endings = (FINISHED, STOPPED) if is_over else (FINISHED,)
    is_finished = result.get("status") in endings and not (result.get("model_path") and not folder.final.exists())
    if not is_finished and not folder.has_checkpoints():
        return None  # it never came to anything worth keeping, so the new recipe takes its place
    changed = differences(before, recipe)
    if changed or recipe.checkpoint.resume == "never":
        what = "a finished run" if is_finished else "an unfinished run"
        problem = f"{folder.path} holds {what}" + (" of a different recipe:" if changed else ".")
        remedy = "Name another output, or set checkpoint.resume: restart to move that run aside and begin anew."
        raise CheckpointError([problem, *changed, remedy])
    if is_finished and result.get("model_path"):
        refuse_damaged(folder)
    return from_json(result) if is_finished else None


def refuse_damaged(folder: RunFolder) -> None:
    """Raise CheckpointError where the final model is not, file by file, what the run wrote."""
    problems = damage(folder.final)
    if problems:
        found = f"{folder.path} holds this run, finished, but its model has changed:"
        remedy = f"Remove {folder.final} to have it written again, or name another output."
        raise CheckpointError([found, *problems, remedy])


def as_json(result: TrainResult) -> dict[str, Any]:
    """The result as plain JSON; the history stays in metrics.jsonl."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "history"}
    return json.loads(json.dumps(fields, default=str))


def from_json(content: dict[str, Any]) -> TrainResult:
    """The result that `as_json` wrote, with its history read again."""
    from training_hub.monitoring.jsonl import read_metrics

    output = Path(content["output_dir"])
    metrics = RunFolder(output).metrics
    return TrainResult(
        **{
            **content,
            "status": "already finished" if content["status"] == FINISHED else content["status"],
            "output_dir": output,
            "model_path": Path(content["model_path"]) if content["model_path"] else None,
            "predictions": Path(content["predictions"]) if content.get("predictions") else None,
            "checkpoints": tuple(Path(path) for path in content["checkpoints"]),
            "history": tuple(read_metrics(metrics)) if metrics.exists() else (),
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
