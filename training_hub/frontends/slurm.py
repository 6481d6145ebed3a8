"""`submit_to_slurm(...)`: the run of a function as a job of Slurm, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.errors import RecipeError
from training_hub.frontends.dialects import recipe_from, request_from
from training_hub.frontends.registry import AlgorithmRegistry

if TYPE_CHECKING:
    from training_hub.launch.slurm.control import Submission


def submit_to_slurm(
    algorithm: str = "sft",
    backend: str | None = None,
    *,
    account: str | None = None,
    partition: str | None = None,
    qos: str | None = None,
    time: str | None = None,
    gpus_per_node: int = 0,
    cpus_per_node: int | None = None,
    memory: str | None = None,
    container: str | None = None,
    container_mounts: str | None = None,
    signal: str = "B:USR1@120",
    requeue: bool = True,
    job_name: str | None = None,
    python: str | None = None,
    before: Sequence[str] = (),
    sbatch: Sequence[str] = (),
    check_rows: bool = False,
    dry_run: bool = False,
    **keywords: Any,
) -> Submission:
    """Check the run that `sft`, `osft` or `lora_sft` would begin with these keywords, and send it to Slurm.

    algorithm, backend: sft, osft or lora_sft, and its backend (its first, as the function has it).
    keywords: those of the function, model_path, data_path, ckpt_output_dir and so on. nnodes and nproc_per_node say how
        many nodes, and processes on each (one for each GPU); where they meet Slurm says.
    account, partition, qos, time, gpus_per_node, cpus_per_node, memory, container, container_mounts, signal, requeue,
        job_name, python, before, sbatch: as the flags of `training-hub slurm submit`.
    check_rows: also read and tokenise all rows here. dry_run: submit nothing; `text` of what is returned is the script.

    Returns a Submission: `job` is its number, None where nothing was submitted, `script` the batch script in the run
    folder. Raises what the function would raise before it loads a weight, and LaunchError where Slurm refuses.
    """
    from training_hub.launch.resources import Resources, procs_of
    from training_hub.launch.slurm.control import submit
    from training_hub.launch.slurm.job import Job
    from training_hub.monitoring.console import open_console

    request = request_from(keywords, algorithm)
    live = [*request.live, *(["callbacks"] if request.watchers else []), *(["metrics"] if request.metrics else [])]
    if live:
        raise RecipeError(
            [f"{name}: a live object stays in this process; save it to a file and name that." for name in live]
        )
    contract = backend or AlgorithmRegistry.list_backends(algorithm)[0]
    recipe = recipe_from(request.layer, algorithm=algorithm, backend=contract)
    job = Job(
        resources=Resources(
            recipe.processes.nodes,
            procs_of(recipe, None, gpus_per_node),
            gpus_per_node,
            cpus_per_node,
            memory,
            container,
        ),
        name=job_name or Path(recipe.output).name or "training-hub",
        account=account,
        partition=partition,
        qos=qos,
        time=time,
        signal=signal,
        is_requeued=requeue,
        container_mounts=container_mounts,
        before=tuple(before),
        options=tuple(sbatch),
        python=python,
    )
    return submit(recipe, job, is_dry=dry_run, console=open_console(recipe.monitoring.console) if check_rows else None)
