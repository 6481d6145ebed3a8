"""How many processes a run has, and where they meet: what the recipe says, else the environment, else one process.

The environment is that of torchrun, in both of its uses: RANK and WORLD_SIZE say that this process is one of several
already; PET_NPROC_PER_NODE and the like give defaults to processes that we start. Behind it comes that of Slurm's srun.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training_hub.errors import RecipeError
from training_hub.launch.slurm.environment import step_problem, step_settings
from training_hub.recipe import Recipe

DEFAULT_PORT = 29500  # torchrun's

FROM_ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "procs": ("PET_NPROC_PER_NODE",),
    "nodes": ("PET_NNODES",),
    "node_rank": ("PET_NODE_RANK",),
    "rdzv_id": ("PET_RDZV_ID",),
    "rdzv_endpoint": ("PET_RDZV_ENDPOINT",),
    "master_addr": ("PET_MASTER_ADDR", "MASTER_ADDR"),
    "master_port": ("PET_MASTER_PORT", "MASTER_PORT"),
}
"""Fields of processes, and what gives them where the recipe does not."""

WHERE = ("rdzv_endpoint", "master_addr", "master_port")


@dataclass(frozen=True)
class Layout:
    """The processes of a run.

    is_rank: this process is one of them, started by torchrun or the like. host and port: where they meet; port 0 is any
    that is free.
    """

    procs: int = 1
    nodes: int = 1
    node_rank: int = 0
    run_id: str = "0"
    host: str = "127.0.0.1"
    port: int = 0
    is_rank: bool = False
    rank: int = 0

    @property
    def world_size(self) -> int:
        return self.procs * self.nodes

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that keeps the run folder, and speaks."""
        return self.rank == 0 and self.node_rank == 0

    @property
    def is_on_loopback(self) -> bool:
        """Whether all of them are on this machine, where nobody else need hear them."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def layout_of(recipe: Recipe, environment: Mapping[str, str], num_devices: Callable[[], int]) -> Layout:
    """The processes of the run. num_devices: how many `auto` and `gpu` mean on a node.

    Raises RecipeError where the settings contradict each other, or where more processes are asked for than there are.
    """
    found, problems = _settings(recipe, environment)
    if problems:
        raise RecipeError(problems)
    procs = num_devices() if found["procs"] in ("auto", "gpu") else int(found["procs"])
    nodes = int(str(found["nodes"]).partition(":")[0])  # torchrun also takes LEAST:MOST
    if "RANK" in environment and "WORLD_SIZE" in environment:
        world_size = int(environment["WORLD_SIZE"])
        if procs * nodes not in (1, world_size):
            raise RecipeError(
                f"processes: {procs} processes on {nodes} nodes are asked for (processes.procs, nproc_per_node, or "
                f"PET_NPROC_PER_NODE and PET_NNODES), but WORLD_SIZE is {world_size}: this process was started as one "
                f"of {world_size}. Leave processes out and let torchrun say it, or start without torchrun, RANK and "
                "WORLD_SIZE."
            )
        return Layout(world_size, is_rank=True, rank=int(environment["RANK"]))
    node_rank = int(found["node_rank"])
    if nodes > 1 and not (found["rdzv_endpoint"] or found["master_addr"]):
        raise RecipeError(
            f"processes.nodes (nnodes): {nodes} nodes must know where to meet. Write processes.rdzv_endpoint: "
            "HOST:PORT (rdzv_endpoint=), with the name of the first node and a free port of it, the same on all nodes."
        )
    if node_rank >= nodes:
        raise RecipeError(
            f"processes.node_rank: found {node_rank}; allowed: 0 to {nodes - 1}, since there are {nodes}."
        )
    host, port = _place(found)
    return Layout(procs, nodes, node_rank, str(found["rdzv_id"]), host, port)


def _settings(recipe: Recipe, environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Every field of processes by the nearest that says it, and what is wrong with the environment's."""
    asked = recipe.processes
    said = {name for name in asked.model_fields_set if getattr(asked, name) not in ("", None)}
    found, problems = asked.model_dump(), []
    given: set[str] = set()
    for name, variables in FROM_ENVIRONMENT.items():
        values = {variable: environment[variable] for variable in variables if environment.get(variable)}
        if name in said or not values:
            continue
        if name in WHERE and said & set(WHERE):
            continue  # the recipe says where they meet, in other words
        if len(set(values.values())) > 1:
            told = ", ".join(f"{variable}={value}" for variable, value in values.items())
            problems.append(f"Conflicting environment variables: {told}. Keep one.")
        value = next(iter(values.values()))
        problem = _problem(name, next(iter(values)), value)
        problems += [problem] if problem else []
        found[name] = value
        given.add(name)
    if {"rdzv_endpoint", "master_addr"} <= given and environment.get("PET_MASTER_ADDR"):
        problems.append("Cannot specify both PET_RDZV_ENDPOINT and PET_MASTER_ADDR: each says where to meet. Keep one.")
    if "RANK" not in environment and not {"nodes", "node_rank"} & given:
        problem = step_problem(environment)
        problems += [problem] if problem else []
        is_told_where = bool((said | given) & set(WHERE))
        for name, value in step_settings(environment).items():
            if name not in said | given and not (name in WHERE and is_told_where):
                found[name] = value
    return found, problems


def _problem(name: str, variable: str, value: str) -> str | None:
    if name in ("rdzv_id", "rdzv_endpoint", "master_addr") or (name == "procs" and value in ("auto", "gpu")):
        return None
    least = 1 if name in ("procs", "nodes") else 0
    number = value.partition(":")[0] if name == "nodes" else value
    if number.isdigit() and int(number) >= least:
        return None
    return f"{variable}: found {value!r}; allowed: a whole number of at least {least}."


def _place(found: Mapping[str, Any]) -> tuple[str, int]:
    """Host and port at which the processes meet."""
    if found["rdzv_endpoint"]:
        host, _, port = str(found["rdzv_endpoint"]).rpartition(":")
        if not host:
            host, port = port, str(DEFAULT_PORT)
        if not port.isdigit():
            raise RecipeError(
                f"processes.rdzv_endpoint: found {found['rdzv_endpoint']!r}; allowed: HOST:PORT, with a number for "
                "the port. Write node0:29500."
            )
        return host.strip("[]"), int(port)
    if found["master_addr"] and (int(found["nodes"] if str(found["nodes"]).isdigit() else 2) > 1):
        return str(found["master_addr"]), int(found["master_port"] or DEFAULT_PORT)
    return "127.0.0.1", 0
