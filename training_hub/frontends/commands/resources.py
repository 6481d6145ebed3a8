"""The flags that say what a run is to have on other machines, for all commands that send it there."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from training_hub.recipe.recipe import Recipe

if TYPE_CHECKING:
    from training_hub.launch.resources import Resources


def add_resource_options(parser: ArgumentParser, name: str, memory: str) -> Any:
    """Add the flags; gives their group. memory: an amount as the scheduler writes it."""
    group = parser.add_argument_group(name)
    group.add_argument("--nodes", type=int, metavar="N", help="nodes (default: processes.nodes)")
    group.add_argument(
        "--procs-per-node",
        type=int,
        metavar="N",
        help="processes on each node (default: processes.procs where it is given, else one for each GPU)",
    )
    group.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs of each node (default: 0)")
    group.add_argument("--cpus-per-node", type=int, metavar="N", help="cores of each node")
    group.add_argument("--memory", metavar="SIZE", help=f"memory of each node, such as {memory}")
    return group


def resources_of(recipe: Recipe, options: Namespace, container: str | None) -> Resources:
    """What the flags ask for, and the recipe where they do not say."""
    from training_hub.launch.resources import Resources, procs_of

    return Resources(
        nodes=recipe.processes.nodes if options.nodes is None else options.nodes,
        procs=procs_of(recipe, options.procs_per_node, options.gpus_per_node),
        gpus_per_node=options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        memory=options.memory,
        container=container,
    )
