"""Protection over a sequence of tasks: the splits of one task, beside its model, are where the next one begins.

A fresh decomposition of a trained weight may take for low what the last task wrote. So the next task cuts only what the
last one left free, and what is written into it is protected as far as it is among the largest of that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.targets import Target
from training_hub.errors import RecipeError

FILE = "osft_state.safetensors"


def state_of(pairs: Iterable[tuple[Target, Split]]) -> dict[str, Tensor]:
    """The tensors of an osft_state.safetensors: `<target>.<field of Split>`."""
    return {f"{target.name}.{name}": t.contiguous() for target, one in pairs for name, t in one.tensors().items()}


@dataclass(frozen=True)
class Carried:
    """What an earlier task protects, read one matrix at a time from the file at `path`; None: there was none."""

    path: Path | None = None

    def of(self, name: str) -> Split | None:
        """What is protected in the target of this name."""
        if self.path is None:
            return None
        with safe_open(self.path, framework="pt") as file:
            return Split(**{one.name: file.get_tensor(f"{name}.{one.name}").clone() for one in fields(Split)})


NOTHING = Carried()


def read_state(folder: Path, targets: Iterable[Target]) -> Carried:
    """What is protected in the model in `folder`; NOTHING where no task has left its state there.

    Raises RecipeError where the state is of other weights than `targets`, or cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return NOTHING
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"osft.carry: {path} cannot be read: {error}. Restore it, or write osft.carry: false."
        ) from error
    names = {key.rpartition(".")[0] for key in keys}
    wanted = {target.name for target in targets}
    if names != wanted:
        apart = ", ".join(sorted(names ^ wanted)[:5])
        raise RecipeError(
            f"osft.carry: {path} protects other weights than this run would ({apart}). Write the osft.targets and "
            "osft.split_fused of the run that wrote it, or osft.carry: false."
        )
    return Carried(path)
