"""Protection over a sequence of tasks: the splits of one task, beside its model, are where the next one begins.

A fresh decomposition of a trained weight may take for low what the last task wrote. So the next task cuts only what the
last one left free, and what is written into it is protected as far as it is among the largest of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.targets import Target
from training_hub.errors import RecipeError

FILE = "osft_state.safetensors"


def state_of(pairs: Iterable[tuple[Target, Split]]) -> dict[str, Tensor]:
    """The tensors of an osft_state.safetensors: `<target>.<field of Split>`."""
    return {f"{target.name}.{name}": t.contiguous() for target, one in pairs for name, t in one.tensors().items()}


def read_state(folder: Path, targets: Iterable[Target]) -> dict[str, Split]:
    """What is protected in the model in `folder`, by target; {} where no task has left its state there.

    Raises RecipeError where the state is of other weights than `targets`, or cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"osft.carry: {path} cannot be read: {error}. Restore it, or write osft.carry: false."
        ) from error
    names = {key.rpartition(".")[0] for key in tensors}
    wanted = {target.name for target in targets}
    if names != wanted:
        apart = ", ".join(sorted(names ^ wanted)[:5])
        raise RecipeError(
            f"osft.carry: {path} protects other weights than this run would ({apart}). Write the osft.targets and "
            "osft.split_fused of the run that wrote it, or osft.carry: false."
        )
    return {name: _split(tensors, name) for name in wanted}


def _split(tensors: Mapping[str, Tensor], name: str) -> Split:
    return Split(**{field.name: tensors[f"{name}.{field.name}"] for field in fields(Split)})
