"""Which processes torchforge's keys ask for: processes, provisioner."""

from __future__ import annotations

from collections.abc import Iterator

from training_hub.frontends.forge.reading import Reading
from training_hub.recipe.translate import shown

MOST_ON_A_HOST = 16
"""GPUs of the largest hosts that are sold (DGX-2); more processes than that are meant for several hosts."""


def processes(reading: Reading) -> Iterator[str]:
    """processes.procs and processes.nodes; procs is per host, which the page of the app gets wrong."""
    procs, hosts = reading.value("processes.procs"), reading.value("processes.hosts")
    if isinstance(procs, str) and procs not in ("gpu", "auto"):
        yield f"processes.procs: found {shown(procs)}; allowed: a whole number, gpu or auto. Write processes.procs: 1"
        return
    if isinstance(procs, int) and procs > MOST_ON_A_HOST:
        nodes = max(1, -(-procs // 8)) if hosts is None else hosts
        yield (
            f"processes.procs: found {procs}, the number of processes of each host, and none has so many GPUs. "
            f"For {procs} in all write processes: {{hosts: {nodes}, procs: 8}}"
        )
        return
    reading.give("processes.procs", procs, "processes.procs")
    if hosts is not None:
        reading.give("processes.nodes", hosts, "processes.hosts")
    if reading.value("processes.with_gpus") and reading.num_devices() == 0:
        reading.notes.append("processes.with_gpus: there is no GPU here, so this run is on the CPU")


def launcher(reading: Reading) -> Iterator[str]:
    """provisioner.launcher: who starts the processes of other hosts."""
    key = "provisioner.launcher"
    named = reading.value(key)
    if named == "slurm" and "SLURM_JOB_ID" not in reading.environment:
        yield (
            f"{key}: found 'slurm', but this is no Slurm job, and the app submits none. Write the recipe with "
            "`training-hub forge --config FILE --recipe RECIPE.yaml` and submit it with `training-hub slurm submit "
            "--config RECIPE.yaml --nodes 4 --gpus-per-node 8`."
        )
    elif named not in (None, "slurm"):
        yield (
            f"{key}: found {shown(named)}; allowed: null, slurm. Leave it out; torchrun, or processes.nodes with "
            "processes.rdzv_endpoint, starts a run on several hosts."
        )


def world_size(reading: Reading) -> tuple[int, str]:
    """How many processes the run has, and why that cannot be told ("" where it can)."""
    told = reading.environment.get("WORLD_SIZE", "")
    if "RANK" in reading.environment and told.isdigit():
        return int(told), ""
    procs, hosts = reading.value("processes.procs"), reading.value("processes.hosts") or 1
    if isinstance(procs, str):
        procs = max(1, reading.num_devices())
    if procs < 1 or hosts < 1:
        return 1, f"processes: found {procs} processes on {hosts} hosts; allowed: at least 1 of each."
    return procs * hosts, ""
