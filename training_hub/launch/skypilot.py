"""A run as a task of SkyPilot, for `sky jobs launch`: a managed job that is started again after a preemption goes on.

Fields as in SkyPilot's YAML reference of version 0.10 (docs.skypilot.co, reference/yaml-spec and reference/volumes).
Each node is told SKYPILOT_NODE_RANK and SKYPILOT_NODE_IPS, by which the nodes meet.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from training_hub.errors import RecipeError
from training_hub.launch.layout import DEFAULT_PORT
from training_hub.launch.resources import Resources, Volume, command_of, here_alone, output_problem, sent_recipe
from training_hub.recipe import Recipe
from training_hub.recipe.yaml_text import write_yaml

END = "END_OF_RECIPE"
STRATEGY = "EAGER_NEXT_REGION"


@dataclass(frozen=True)
class Task:
    """What is asked of SkyPilot. accelerators: the kind of GPU, H100; their number is resources.gpus_per_node. infra:
    where, such as aws/us-east-1 or k8s. volumes: names of SkyPilot's volumes, or buckets (s3://...), and where they are
    mounted. install: a shell line that makes `python` have training-hub. secrets: names of environment variables."""

    resources: Resources = field(default_factory=Resources)
    name: str = "training-hub"
    accelerators: str | None = None
    infra: str | None = None
    is_spot: bool = False
    volumes: tuple[Volume, ...] = ()
    install: str | None = None
    secrets: tuple[str, ...] = ()


def task_yaml(recipe: Recipe, task: Task) -> str:
    """The YAML of the task. Raises RecipeError listing what cannot work there."""
    problems = list(_problems(recipe, task))
    if problems:
        raise RecipeError(problems)
    fields = {name: value for name, value in _fields(recipe, task).items() if value not in (None, {}, [])}
    return write_yaml(fields, has_blocks=True)


def _problems(recipe: Recipe, task: Task) -> Iterator[str]:
    resources = task.resources
    if resources.gpus_per_node and task.accelerators is None:
        yield f"--accelerators: not given for {resources.gpus_per_node} GPUs on a node. Write --accelerators H100."
    if task.accelerators is not None and not resources.gpus_per_node:
        yield f"--gpus-per-node: not given for {task.accelerators}. Write --gpus-per-node 8."
    if problem := output_problem(recipe, task.volumes):
        yield problem
    yield from here_alone(recipe, task.volumes)
    home = next((one for one in task.volumes if one.holds(recipe.output)), None)
    if home is not None and home.is_bucket and resources.nodes > 1:
        yield (
            f"output: {recipe.output} lies in the bucket {home.source}, whose files are not the same on all of "
            f"{resources.nodes} nodes at once. Name a volume of SkyPilot for it: --volume NAME:/PATH."
        )


def _fields(recipe: Recipe, task: Task) -> dict[str, Any]:
    resources = task.resources
    gpus = f"{task.accelerators}:{resources.gpus_per_node}" if task.accelerators else None
    hardware = {
        "infra": task.infra,
        "accelerators": gpus,
        "cpus": f"{resources.cpus_per_node}+" if resources.cpus_per_node is not None else None,
        "memory": resources.memory,
        "use_spot": task.is_spot or None,
        "image_id": f"docker:{resources.container}" if resources.container else None,
        "job_recovery": {"strategy": STRATEGY},
    }
    return {
        "name": task.name,
        "num_nodes": resources.nodes,
        "resources": {name: value for name, value in hardware.items() if value is not None},
        # Empty: SkyPilot then refuses to begin without --secret NAME.
        "secrets": dict.fromkeys(task.secrets, ""),
        "volumes": {one.path: one.source for one in task.volumes if not one.is_bucket},
        "file_mounts": {
            # The cached mode alone can append and rename, as a run does.
            one.path: {"source": one.source, "mode": "MOUNT_CACHED"}
            for one in task.volumes
            if one.is_bucket
        },
        "setup": task.install,
        "run": _run(recipe, task),
    }


def _run(recipe: Recipe, task: Task) -> str:
    file = "$HOME/training-hub-recipe.yaml"
    lines = [
        f"cat > \"{file}\" <<'{END}'",
        sent_recipe(recipe, task.resources).rstrip("\n"),
        END,
        'export PET_NODE_RANK="$SKYPILOT_NODE_RANK"',
        f'export PET_RDZV_ENDPOINT="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{DEFAULT_PORT}"',
        f'{shlex.join(command_of(recipe, "python", "FILE")[:-1])} "{file}"',
    ]
    return "\n".join(lines) + "\n"
