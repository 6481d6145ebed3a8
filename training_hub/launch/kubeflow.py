"""A run as a TrainJob of Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1), with its recipe in a ConfigMap beside it.

Fields as of Kubeflow Trainer 2.2.0 (pkg/apis/trainer/v1alpha1/trainjob_types.go): `runtimePatches` took the place of
`podTemplateOverrides` there. The runtime must be one with the `torch` policy, such as torch-distributed: it tells each
pod PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which a run reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from training_hub.errors import RecipeError
from training_hub.launch.resources import Resources, Volume, command_of, here_alone, output_problem, sent_recipe
from training_hub.recipe import Recipe
from training_hub.recipe.yaml_text import write_yaml

API_VERSION = "trainer.kubeflow.org/v1alpha1"
MANAGER = "training-hub.dev/generator"
NODE = "node"  # the replicated job and the container of the torch runtimes
RECIPE_FOLDER = PurePosixPath("/etc/training-hub")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035, as the API demands
SECRET = "training-hub"


@dataclass(frozen=True)
class TrainJob:
    """What is asked of Kubeflow. volumes: claims and where they are mounted. secrets: names of environment variables
    that stand in the Secret `training-hub`. runtime: a ClusterTrainingRuntime."""

    resources: Resources = field(default_factory=Resources)
    name: str = "training-hub"
    namespace: str | None = None
    runtime: str = "torch-distributed"
    volumes: tuple[Volume, ...] = ()
    secrets: tuple[str, ...] = ()


def manifest(recipe: Recipe, job: TrainJob) -> str:
    """The YAML of ConfigMap and TrainJob, for `kubectl apply`. Raises RecipeError listing what cannot work there."""
    problems = list(_problems(recipe, job))
    if problems:
        raise RecipeError(problems)
    return "---\n".join(
        write_yaml(document, has_blocks=True) for document in (_config_map(recipe, job), _train_job(recipe, job))
    )


def _problems(recipe: Recipe, job: TrainJob) -> Iterator[str]:
    if not NAME.fullmatch(job.name):
        yield (
            f"--name: found {job.name!r}; allowed: at most 63 of a-z, 0-9 and -, a letter first, no - last. Write "
            "--name training-hub."
        )
    if isinstance(job.resources.procs, str):
        yield f"--procs-per-node: found {job.resources.procs}; a TrainJob takes a number. Write --gpus-per-node N."
    if job.resources.container is None:
        yield "--image: not given; the image must hold training-hub. Write --image IMAGE."
    if problem := output_problem(recipe, job.volumes):
        yield problem
    yield from here_alone(recipe, job.volumes)


def _metadata(job: TrainJob, name: str) -> dict[str, Any]:
    return {"name": name, **({"namespace": job.namespace} if job.namespace else {})}


def _config_map(recipe: Recipe, job: TrainJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, _recipe_name(job)),
        # Without a word of processes: the runtime says them in PET_ variables.
        "data": {"recipe.yaml": sent_recipe(recipe, None)},
    }


def _train_job(recipe: Recipe, job: TrainJob) -> dict[str, Any]:
    resources = job.resources
    trainer: dict[str, Any] = {
        "image": resources.container,
        "command": command_of(recipe, "python3", str(RECIPE_FOLDER / "recipe.yaml")),
        "numNodes": resources.nodes,
        "numProcPerNode": resources.procs,
    }
    if amounts := _amounts(resources):
        trainer["resourcesPerNode"] = {"requests": amounts, "limits": amounts}
    if job.secrets:
        trainer["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name}}} for name in job.secrets
        ]
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainJob",
        "metadata": _metadata(job, job.name),
        "spec": {"runtimeRef": {"name": job.runtime}, "trainer": trainer, "runtimePatches": [_mounts(job)]},
    }


def _amounts(resources: Resources) -> dict[str, Any]:
    amounts = {
        "cpu": resources.cpus_per_node,
        "memory": resources.memory,
        "nvidia.com/gpu": resources.gpus_per_node or None,
    }
    return {name: amount for name, amount in amounts.items() if amount is not None}


def _mounts(job: TrainJob) -> dict[str, Any]:
    """The patch that gives each pod the recipe, the volumes, and memory to share between its processes."""
    volumes: list[dict[str, Any]] = [
        {"name": "recipe", "configMap": {"name": _recipe_name(job)}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [
        {"name": "recipe", "mountPath": str(RECIPE_FOLDER), "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    for number, volume in enumerate(job.volumes):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": volume.source}})
        mounts.append({"name": f"volume-{number}", "mountPath": volume.path})
    pod = {"volumes": volumes, "containers": [{"name": NODE, "volumeMounts": mounts}]}
    template = {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}]}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": template}}


def _recipe_name(job: TrainJob) -> str:
    return f"{job.name}-recipe"
