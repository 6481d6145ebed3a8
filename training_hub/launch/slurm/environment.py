"""What srun tells each of its tasks, as settings of `processes`: how many nodes, which one this is, where to meet."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT = 20_000  # below those that systems give away by themselves


def step_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings of `processes` by name, for a task of srun; {} elsewhere, and for a single task."""
    if not _is_step(environment) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return {}
    host = first_host(environment["SLURM_STEP_NODELIST"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "nodes": environment["SLURM_STEP_NUM_NODES"],
        "node_rank": environment["SLURM_NODEID"],
        "rdzv_id": f"slurm-{job}.{step}",
        "rdzv_endpoint": f"{host}:{FIRST_PORT + job % 1000 * 10 + step % 10}",
    }


def step_problem(environment: Mapping[str, str]) -> str | None:
    """Why the tasks of srun cannot be the nodes of a run; None where they can, and outside of srun."""
    if not _is_step(environment):
        return None
    tasks, nodes = environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_STEP_NUM_NODES"]
    if tasks == nodes:
        return None
    return (
        f"srun started {tasks} tasks on {nodes} nodes (SLURM_STEP_NUM_TASKS, SLURM_STEP_NUM_NODES); allowed: one for "
        "each node, which then starts processes.procs processes. Write srun --ntasks-per-node=1. Where each task is to "
        "be a run of its own, unset SLURM_STEP_NUM_TASKS in it."
    )


def first_host(hosts: str) -> str:
    """The first of a list as Slurm writes it: node01 of `node[01-03,7],gpu1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else hosts)


def _is_step(environment: Mapping[str, str]) -> bool:
    wanted = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NODEID")
    return all(environment.get(name) for name in wanted)
