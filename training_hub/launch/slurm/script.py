"""The batch script of a run: readable, with every name and path quoted, and nothing secret in it.

Slurm starts it on the first node. It starts one task on each node, and says what becomes of the job by how they ended.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from training_hub.errors import RecipeError
from training_hub.launch.resources import command_of
from training_hub.launch.slurm.job import Job
from training_hub.launch.supervisor import python_path
from training_hub.recipe import Recipe
from training_hub.version import VERSION

SAVED = 128 + signal.SIGTERM
"""How a task ends that was asked to stop and has saved; another signal is not followed by going on."""


def batch_script(recipe: Recipe, job: Job, folder: Path, place: Path) -> str:
    """The text of the script. folder: where script, recipe and log lie; place: where relative paths begin.

    Raises RecipeError for a folder that sbatch cannot be told of.
    """
    for path in (folder, place):
        if re.search(r"[\0\r\n\\]", str(path)):
            raise RecipeError(
                f"output: {str(path)!r} holds a line break or a backslash, which sbatch reads as something else. Name "
                "another folder."
            )
    return "\n".join([*_head(folder), *_directives(job, folder, place), "", *_body(recipe, job, folder)]) + "\n"


def _head(folder: Path) -> Iterator[str]:
    yield "#!/bin/bash"
    yield f"# The run in {folder.parent}, as training-hub {VERSION} submits it."
    yield f"# To submit it again: {_again(folder)}"


def _directives(job: Job, folder: Path, place: Path) -> Iterator[str]:
    resources = job.resources
    settings = {
        "job-name": job.name,
        "account": job.account,
        "partition": job.partition,
        "qos": job.qos,
        "time": job.time,
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus_per_node,
        "gpus-per-node": resources.gpus_per_node or None,
        "mem": resources.memory,
        "chdir": place,
        "output": f"{str(folder).replace('%', '%%')}/job-%j.log",
        "open-mode": "append",
        "signal": job.signal,
    }
    for name, value in settings.items():
        if value is not None:
            yield f"#SBATCH --{name}={quoted(str(value))}"
    yield f"#SBATCH --{'requeue' if job.is_requeued else 'no-requeue'}"
    for option in job.options:
        name, equals, value = option.partition("=")
        yield f"#SBATCH {name}{equals}{quoted(value)}" if equals else f"#SBATCH {option}"


def quoted(value: str) -> str:
    """`value` as sbatch reads it from a line of a script: in quotes, where a backslash gives the next character.

    Without quotes a space ends the value, behind a backslash as well (Slurm 22.05).
    """
    if not re.search(r"[\s'\"#\\]", value):
        return value
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'"{escaped}"'


def _body(recipe: Recipe, job: Job, folder: Path) -> Iterator[str]:
    yield "set -u"
    yield from job.before
    if path := _package_path(job):
        yield f"export PYTHONPATH={shlex.quote(path)}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield ""
    yield "# One task on each node. By what srun tells it, it knows which node it is and where they meet, and starts"
    yield "# the processes of its node."
    yield f"{_task(recipe, job, folder)} &"
    yield "step=$!"
    yield ""
    yield from _traps(job)
    yield "# A signal ends a wait, not the tasks."
    yield 'while kill -0 "$step" 2> /dev/null; do wait "$step"; done'
    yield 'wait "$step"'
    yield "code=$?"
    yield ""
    yield from _ending(job, folder)


def _task(recipe: Recipe, job: Job, folder: Path) -> str:
    resources = job.resources
    image = resources.container
    python = job.python or ("python3" if image else sys.executable)
    words = ["srun", f"--nodes={resources.nodes}", "--ntasks-per-node=1", "--wait=0"]
    if resources.cpus_per_node is not None:  # since Slurm 22.05 a step does not take it over from its job
        words.append(f"--cpus-per-task={resources.cpus_per_node}")
    if resources.gpus_per_node:
        words.append(f"--gpus-per-node={resources.gpus_per_node}")
    if image and is_apptainer(image):
        mounts = ["--bind", job.container_mounts] if job.container_mounts else []
        words += ["apptainer", "exec", *(["--nv"] if resources.gpus_per_node else []), *mounts, image]
    elif image:
        mounts = [f"--container-mounts={job.container_mounts}"] if job.container_mounts else []
        words += [f"--container-image={image}", *mounts]
    return shlex.join([*words, *command_of(recipe, python, str(folder / "recipe.yaml"))])


def is_apptainer(image: str) -> bool:
    """Whether the image is a file of Apptainer; any other is one of pyxis, srun's --container-image."""
    return image.endswith(".sif")


def _package_path(job: Job) -> str:
    return "" if job.resources.container else python_path(None)


def _traps(job: Job) -> Iterator[str]:
    if job.signal.startswith("B:"):
        name = job.signal.partition(":")[2].partition("@")[0]
        yield "# Slurm says that time is nearly up: the tasks, not this script, are told to save and end."
        yield f"trap 'scancel --signal=TERM \"$SLURM_JOB_ID\"' {name}"
    yield "# Whoever ends the job has told the tasks already; this script stays to see how they end."
    yield "trap : TERM"


def _ending(job: Job, folder: Path) -> Iterator[str]:
    again = f"To go on: {_again(folder)}"
    if job.is_requeued:
        yield f'if [ "$code" -eq {SAVED} ]; then'
        yield "    echo 'The run has saved its state, and goes on when Slurm starts this job again.'"
        yield f'    scontrol requeue "$SLURM_JOB_ID" || echo {shlex.quote(again)}'
        yield "fi"
    yield 'exit "$code"'


def _again(folder: Path) -> str:
    return f"sbatch {shlex.quote(str(folder / 'job.sh'))}"
