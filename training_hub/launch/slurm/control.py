"""Submit a run, ask how it stands, read along, end it: a run folder, and Slurm's own commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from training_hub.backends import Planner
from training_hub.data.sources import open_sources
from training_hub.errors import LaunchError, RecipeError
from training_hub.folders import write_json, write_text
from training_hub.launch import settle, willing_engine
from training_hub.launch.endings import log_of
from training_hub.launch.resources import Resources, sent_recipe
from training_hub.launch.slurm import client
from training_hub.launch.slurm.job import Job, refuse_wrong
from training_hub.launch.slurm.script import batch_script, is_apptainer
from training_hub.launch.slurm.words import sentences
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console

LOOK_SECONDS = 0.5
ASK_SECONDS = 5.0
"""How often Slurm is asked while something is waited for; its controller serves a whole cluster."""


@dataclass(frozen=True)
class Submission:
    """A run that was sent to Slurm. job: its number; None where the folder held this very run, finished, and for a dry
    run. text: the batch script."""

    job: str | None
    output_dir: Path
    script: Path
    text: str = ""


@dataclass(frozen=True)
class Sent:
    """A job and its run folder, which is None where Slurm no longer says."""

    job: str
    folder: Path | None


def submit(recipe: Recipe, job: Job, *, is_dry: bool = False, console: Console | None = None) -> Submission:
    """Check the run as one that begins here, write what the job needs into its folder, and send it to Slurm.

    is_dry: only say what would be sent. console: also read and tokenise all rows here, and say how far that is.
    Raises RecipeError, DataError or CheckpointError as a run would, and LaunchError where Slurm refuses or the run is
    in its queue already.
    """
    refuse_wrong(job)
    judge(recipe, job.resources, console)
    folder = RunFolder(Path(recipe.output).expanduser().resolve())
    place = folder.path / "slurm"
    text = batch_script(recipe, job, place, Path.cwd())
    submission = Submission(None, folder.path, place / "job.sh", text)
    begins_anew = recipe.checkpoint.resume == "restart"
    if not begins_anew and settle(folder, recipe) is not None:
        return submission
    if is_dry:
        return submission
    _refuse_second(place)
    _refuse_container(job)
    if begins_anew and folder.recipe.exists():
        folder.move_aside()
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "recipe.yaml", sent_recipe(recipe, job.resources))
    write_text(submission.script, text)
    number = client.send(str(submission.script))
    write_json(place / "job.json", {"job": number, "submitted": time.time()})
    return replace(submission, job=number)


def judge(recipe: Recipe, resources: Resources, console: Console | None) -> None:
    """Raise what a run of the recipe would raise before it loads a weight; with a console, after reading all rows.

    What depends on the devices of a node is left to the node: this one may have none, or others.
    """
    local = resources.procs if isinstance(resources.procs, int) else max(1, resources.gpus_per_node)
    without = {
        "training": recipe.training.model_copy(update={"fp8": False}),
        "parallelism": recipe.parallelism.model_copy(update={"enable_cpu_offload": False}),
        # As many processes in all, and none that takes a device here.
        "processes": recipe.processes.model_copy(update={"procs": 1, "nodes": local * resources.nodes}),
    }
    here = recipe.model_copy(update=without)
    engine = willing_engine(here)
    open_sources(recipe.data)
    if console is not None:
        if not isinstance(engine, Planner):
            raise RecipeError(f"--check-rows: backend {engine.name!r} makes no plans. Leave it out.")
        engine.plan(here, console, measures=False)


def _refuse_second(place: Path) -> None:
    earlier = _noted(place)
    state = client.state_of(earlier) if earlier else None
    if state is not None and not state.is_over:
        raise LaunchError(
            f"output: {place.parent} is the folder of job {earlier}, which is {state.state.lower()}. Wait for it, end "
            "it with `training-hub slurm cancel`, or name another output."
        )


def _refuse_container(job: Job) -> None:
    image = job.resources.container
    if image and not is_apptainer(image) and "--container-image" not in client.ask("srun", "--help"):
        raise RecipeError(
            f"--container: found {image!r}; srun has no --container-image here, since pyxis is not installed. Name a "
            "file of Apptainer (IMAGE.sif), or leave it out."
        )


def _noted(place: Path) -> str | None:
    file = place / "job.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["job"]) if file.is_file() else None


def find(run: str) -> Sent:
    """The job that `run` names, by its number or its run folder. Raises RecipeError."""
    folder = Path(run).expanduser().resolve()
    noted = _noted(folder / "slurm")
    if noted:
        return Sent(noted, folder)
    if run.isdigit():
        script = client.script_of(run)
        return Sent(run, Path(script).parent.parent if script and Path(script).name == "job.sh" else None)
    raise RecipeError(
        f"{run}: found neither the number of a job nor the folder of a run that was sent to Slurm (it holds "
        "slurm/job.json). Name the `output` of the run."
    )


def status(run: str) -> list[str]:
    """How the job and its run stand, in sentences."""
    sent = find(run)
    return list(sentences(client.state_of(sent.job), sent.job, sent.folder))


def log_file(sent: Sent, rank: int | None) -> Path:
    """What the job says, or one process of its run. Raises LaunchError where the folder is not known."""
    if sent.folder is None:
        raise LaunchError(f"job {sent.job}: Slurm no longer says where its run folder is. Name that instead.")
    return sent.folder / "slurm" / f"job-{sent.job}.log" if rank is None else log_of(sent.folder, rank)


def follow(run: str, rank: int | None = None, *, to_the_end: bool = True) -> Iterator[str]:
    """The text of a log, piece by piece as it is written, until the job is over; only what is there, if asked."""
    sent = find(run)
    file, place, asked_at, is_over = log_file(sent, rank), 0, 0.0, not to_the_end
    while True:
        text = ""
        if file.is_file():
            with file.open("rb") as log:
                log.seek(place)
                read = log.read()
            place += len(read)
            text = read.decode("utf-8", "replace")
        if text:
            yield text
        elif is_over:
            return
        elif time.monotonic() - asked_at > ASK_SECONDS:
            state, asked_at = client.state_of(sent.job), time.monotonic()
            is_over = state is None or state.is_over
        else:
            time.sleep(LOOK_SECONDS)


def cancel(run: str, *, wait_seconds: float, say: Callable[[str], None]) -> None:
    """End the job. A run that is at work saves its state first; after wait_seconds it is ended all the same.

    wait_seconds 0: end it at once.
    """
    sent = find(run)
    state = client.state_of(sent.job)
    if state is None or state.is_over:
        say(f"job {sent.job} is over already")
        return
    if state.state == "RUNNING" and wait_seconds > 0:
        # Another signal than before a time limit: after this one the batch script does not ask to be started again.
        client.ask("scancel", "--signal=INT", sent.job)
        say(f"job {sent.job} is told to save and end; waiting up to {wait_seconds:g} s")
        if _is_over_within(sent.job, wait_seconds):
            say(f"job {sent.job} has ended")
            return
        say(f"job {sent.job} has not ended by itself")
    client.ask("scancel", sent.job)
    say(f"job {sent.job} is cancelled")


def _is_over_within(job: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(LOOK_SECONDS * 2, seconds))
        state = client.state_of(job)
        if state is None or state.is_over:
            return True
    return False
