"""What a run is to have on the machines it is sent to, and the recipe as these read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.sections import DataSource
from training_hub.recipe.yaml_text import write_yaml


@dataclass(frozen=True)
class Resources:
    """Nodes, and what each of them has.

    procs: processes on a node, or "gpu": one for each GPU there. memory: as the scheduler writes it, such as 64G.
    container: the image that the run's software is in; without one it is on the machines.
    """

    nodes: int = 1
    procs: int | str = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    memory: str | None = None
    container: str | None = None


def procs_of(recipe: Recipe, asked: int | None, gpus_per_node: int) -> int | str:
    """Processes on a node: what was asked for, else what the recipe says, else one for each GPU."""
    if asked is not None:
        return asked
    if "procs" in recipe.processes.model_fields_set:
        return recipe.processes.procs
    return max(1, gpus_per_node)


@dataclass(frozen=True)
class Volume:
    """Storage that outlives a machine, and the folder where it is seen. source: a name, or the address of a bucket."""

    source: str
    path: str

    @property
    def is_bucket(self) -> bool:
        return "://" in self.source

    def holds(self, path: str) -> bool:
        return PurePosixPath(path).is_relative_to(self.path)


def volume_of(text: str) -> Volume:
    """The volume that a flag writes as SOURCE:/PATH. Raises RecipeError."""
    source, _, path = text.rpartition(":")
    if not source or source.endswith(":") or not path.startswith("/") or path.startswith("//"):
        raise RecipeError(f"--volume: found {text!r}; allowed: SOURCE:/PATH. Write --volume my-claim:/workspace.")
    return Volume(source, path)


def output_problem(recipe: Recipe, volumes: Iterable[Volume]) -> str | None:
    """Why the run's folder would be lost with the machine; None where it lies on a volume."""
    if any(one.holds(recipe.output) for one in volumes):
        return None
    known = ", ".join(one.path for one in volumes)
    return (
        f"output: {recipe.output!r} lies on no volume{f' ({known})' if known else ''}, so what it holds would be lost "
        "with the machine. Write --volume SOURCE:/workspace and --output /workspace/run."
    )


def here_alone(recipe: Recipe, volumes: Iterable[Volume]) -> Iterator[str]:
    """Problems with what the recipe names by a path of this machine, which others do not have."""
    data = recipe.data
    listed = data.path if isinstance(data.path, list) else [data.path]
    kept_back = data.validation if isinstance(data.validation, list) else [data.validation]
    named = [
        ("model.path", recipe.model.path),
        ("model.tokenizer", recipe.model.tokenizer),
        *(("data.path", one.path if isinstance(one, DataSource) else one) for one in listed),
        *(("data.validation", one) for one in kept_back),
    ]
    for setting, path in named:
        if path and Path(path).expanduser().exists() and not any(one.holds(path) for one in volumes):
            yield (
                f"{setting}: {path!r} lies on this machine alone. Copy it to a volume and write its path, or name "
                "one on the hub."
            )


def sent_recipe(recipe: Recipe, resources: Resources | None) -> str:
    """The recipe as YAML for each node: with its processes, and no word of which node it is or where they meet.

    resources: None where the machines themselves say how many processes there are. checkpoint.resume becomes auto:
    whoever starts the run again there wants it to go on.
    """
    settings = recipe.model_dump(mode="python")
    del settings["processes"]
    if resources is not None:
        settings["processes"] = {"procs": resources.procs, "nodes": resources.nodes}
    settings["checkpoint"]["resume"] = "auto"
    return write_yaml(settings)


def command_of(recipe: Recipe, python: str, config: str) -> list[str]:
    """The words that run the recipe in the file `config`."""
    return [python, "-m", "training_hub", recipe.algorithm.replace("_", "-"), "--config", config]
