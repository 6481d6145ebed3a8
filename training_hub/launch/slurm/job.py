"""A run as a Slurm job: what is asked of Slurm for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from training_hub.errors import RecipeError
from training_hub.launch.resources import Resources

SIGNAL = "B:USR1@120"

OURS = {
    "job-name": "--job-name",
    "J": "--job-name",
    "account": "--account",
    "A": "--account",
    "partition": "--partition",
    "p": "--partition",
    "qos": "--qos",
    "q": "--qos",
    "time": "--time",
    "t": "--time",
    "nodes": "--nodes",
    "N": "--nodes",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-node",
    "c": "--cpus-per-node",
    "mem": "--memory",
    "signal": "--signal",
    "requeue": "--requeue",
    "no-requeue": "--no-requeue",
    "ntasks": "--nodes and --procs-per-node",
    "n": "--nodes and --procs-per-node",
    "ntasks-per-node": "--procs-per-node",
    "container-image": "--container",
}
"""Options of sbatch that ours set, by the name without its hyphens."""
FIXED = ("output", "o", "error", "e", "open-mode", "chdir", "D", "wrap", "parsable", "array", "a")
"""Options of sbatch that a run cannot do with another value of."""


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm; None is what the cluster does by itself.

    signal: as sbatch takes it. container_mounts: SOURCE:TARGET,... in a container. before: shell lines, run first.
    options: further options of sbatch, as --name=value. python: the interpreter on the nodes.
    """

    resources: Resources = field(default_factory=Resources)
    name: str = "training-hub"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    signal: str = SIGNAL
    is_requeued: bool = True
    container_mounts: str | None = None
    before: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    python: str | None = None


def refuse_wrong(job: Job) -> None:
    """Raise RecipeError listing what Slurm or the run could not do with."""
    problems = [*_numbers(job), *_signal(job), *_options(job), *_texts(job), *_container(job)]
    if problems:
        raise RecipeError(problems)


def _numbers(job: Job) -> Iterator[str]:
    resources = job.resources
    at_least_one = {"--nodes": resources.nodes, "--cpus-per-node": resources.cpus_per_node}
    if isinstance(resources.procs, int):
        at_least_one["--procs-per-node"] = resources.procs
    for flag, number in at_least_one.items():
        if number is not None and number < 1:
            yield f"{flag}: found {number}; allowed: a whole number of at least 1."
    if resources.gpus_per_node < 0:
        yield f"--gpus-per-node: found {resources.gpus_per_node}; allowed: a whole number of at least 0."
    elif isinstance(resources.procs, int) and 0 < resources.gpus_per_node < resources.procs:
        yield (
            f"--procs-per-node: found {resources.procs} for {resources.gpus_per_node} GPUs on a node; each process "
            f"takes a GPU of its own. Write --procs-per-node {resources.gpus_per_node}."
        )


def _signal(job: Job) -> Iterator[str]:
    if re.fullmatch(r"(B:USR[12]|TERM)@[1-9]\d*", job.signal):
        return
    yield (
        f"--signal: found {job.signal!r}; allowed: B:USR1@SECONDS, B:USR2@SECONDS (to the batch script, which tells "
        f"the processes to save) or TERM@SECONDS (to the processes themselves). Write --signal {SIGNAL}."
    )


def _options(job: Job) -> Iterator[str]:
    for option in job.options:
        match = re.fullmatch(r"--([a-z][a-z-]*)(?:=.*)?|-([a-zA-Z])(?:.*)", option)
        if match is None:
            yield f"--sbatch: found {option!r}; allowed: an option of sbatch, such as --sbatch=--constraint=h100."
            continue
        name = match[1] or match[2]
        if name in OURS:
            yield f"--sbatch {option}: write {OURS[name]} instead, which the run must know of."
        elif name in FIXED:
            yield f"--sbatch {option}: the run sets this itself, to be able to find its log and go on. Leave it out."


def _texts(job: Job) -> Iterator[str]:
    resources = job.resources
    texts = {
        "--job-name": job.name,
        "--account": job.account,
        "--partition": job.partition,
        "--qos": job.qos,
        "--time": job.time,
        "--memory": resources.memory,
        "--container": resources.container,
        "--container-mounts": job.container_mounts,
        "--python": job.python,
        **{f"--sbatch {option}": option for option in job.options},
    }
    for flag, text in texts.items():
        if text is not None and (not text.strip() or re.search(r"[\0\r\n]", text)):
            yield f"{flag}: found {text!r}; allowed: one line that is not empty."


def _container(job: Job) -> Iterator[str]:
    if job.container_mounts is not None and job.resources.container is None:
        yield "--container-mounts: found without a container. Write --container IMAGE, or leave it out."
