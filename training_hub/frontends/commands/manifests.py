"""`training-hub kubeflow` and `training-hub skypilot`: the YAML with which others start the run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from training_hub.errors import RecipeError
from training_hub.frontends.commands.resources import add_resource_options, resources_of
from training_hub.recipe.recipe import Recipe

if TYPE_CHECKING:
    from training_hub.launch.resources import Volume


def add_kubeflow_options(parser: ArgumentParser) -> None:
    group = add_resource_options(parser, "kubeflow", "64Gi")
    _add_shared(group, "claim of a volume")
    group.add_argument("--namespace", metavar="NAME", help="namespace (default: kubectl's)")
    group.add_argument(
        "--runtime",
        default="torch-distributed",
        metavar="NAME",
        help="a ClusterTrainingRuntime with the torch policy (default: torch-distributed)",
    )


def kubeflow(recipe: Recipe, options: Namespace) -> int:
    """Print the manifest, for `kubectl apply -f -`."""
    from training_hub.launch.kubeflow import TrainJob, manifest

    job = TrainJob(
        resources=resources_of(recipe, options, options.image),
        name=options.name,
        namespace=options.namespace,
        runtime=options.runtime,
        volumes=_volumes(options),
        secrets=tuple(options.secret),
    )
    print(manifest(recipe, job), end="")
    return 0


def add_skypilot_options(parser: ArgumentParser) -> None:
    group = add_resource_options(parser, "skypilot", "64+")
    _add_shared(group, "name of a volume of SkyPilot's, or address of a bucket")
    group.add_argument("--accelerators", metavar="KIND", help="kind of GPU, such as H100")
    group.add_argument("--infra", metavar="WHERE", help="where to run, such as aws/us-east-1 or k8s")
    group.add_argument("--spot", action="store_true", help="machines that may be taken away; the run then goes on")
    group.add_argument(
        "--install",
        metavar="LINE",
        help="shell line that installs training-hub on a machine (default: the image has it)",
    )


def skypilot(recipe: Recipe, options: Namespace) -> int:
    """Print the task, for `sky jobs launch`."""
    from training_hub.launch.skypilot import Task, task_yaml

    task = Task(
        resources=resources_of(recipe, options, options.image),
        name=options.name,
        accelerators=options.accelerators,
        infra=options.infra,
        is_spot=options.spot,
        volumes=_volumes(options),
        install=options.install,
        secrets=tuple(options.secret),
    )
    print(task_yaml(recipe, task), end="")
    return 0


def _add_shared(group: Any, source: str) -> None:
    group.add_argument("--name", default="training-hub", metavar="NAME", help="name of the job (default: training-hub)")
    group.add_argument("--image", metavar="IMAGE", help="container image that holds training-hub")
    group.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="SOURCE:/PATH",
        help=f"{source}, and where it is mounted; `output` must lie on one; may be given again",
    )
    group.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="an environment variable that is a secret, such as HF_TOKEN; its value is not written; may be given again",
    )


def _volumes(options: Namespace) -> tuple[Volume, ...]:
    from training_hub.launch.resources import volume_of

    found, problems = [], []
    for text in options.volume:
        try:
            found.append(volume_of(text))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return tuple(found)
