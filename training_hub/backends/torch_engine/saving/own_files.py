"""A folder of weights that all processes of a run write into, each files of its own, and what comes of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written
from training_hub.backends.torch_engine.saving.export import WholeModel
from training_hub.backends.torch_engine.saving.final_file import FinalFile, Parts, bytes_of
from training_hub.backends.torch_engine.saving.writing import Writer
from training_hub.errors import DiskError, TrainingError
from training_hub.folders import FileFacts, facts_of_file, write_json, write_whole

INDEX = "model.safetensors.index.json"
ONE_FILE = "1000000TB"


@dataclass
class Made:
    """What a process wrote: facts of its files, the file of each of its tensors, weights that nothing had moved, those
    that came out otherwise; bytes: of all its tensors, and the most that it held of them at a time."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    bytes: int = 0
    most_held: int = 0


class OwnFiles:
    """The files of `folder` that process `rank` writes, one after the other. A problem of the disk is noted, and from
    then on nothing is written: others count on this process to go on."""

    def __init__(self, model: Any, folder: Path, written: Written, rank: int):
        self._model, self._folder, self._written, self._rank = model, folder, written, rank
        self._file: FinalFile | None = None
        self._writer, self._made, self._problem = Writer(), Made(), ""

    def begin(self, name: str, parts: Parts) -> None:
        """The file `name`, which is to hold `parts`, comes next."""
        with self._noted():
            self._file = FinalFile(self._model, self._folder / name, parts)

    def put(self, name: str, whole: Tensor, came: OpenBase) -> None:
        """Write a tensor of the model into the file, as it came if nothing has moved it."""
        if self._problem or self._file is None:
            return
        with self._noted():
            same, done = came.unmoved([name], whole, self._written), self._made
            dtype = self._written.dtype if whole.is_floating_point() else whole.dtype
            tensor = whole.to(dtype) if same is None else same
            done.unmoved += [] if same is None else [name]
            held = self._file.held + bytes_of(whole) + (0 if tensor is whole else bytes_of(tensor))
            done.most_held = max(done.most_held, held)
            done.bytes += self._file.put(name, tensor)

    def end(self) -> None:
        """All of the file has come: look what it holds, while the next one is written."""
        self._wait()
        if self._file is not None and not self._problem:
            self._writer.start(partial(_finish, self._file, self._made))
        self._file = None

    def told(self) -> dict[str, Any]:
        """What came of it, or the problem that was met, as plain JSON."""
        self._wait()
        return {"problem": self._problem, **asdict(self._made)}

    def _wait(self) -> None:
        with self._noted():
            self._writer.wait()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._problem = self._problem or f"rank {self._rank}: {error}"


def _finish(made: FinalFile, done: Made) -> None:
    """Look what the file holds, and what the manifest is to say of it."""
    done.wrong += made.finish()
    with safe_open(made.path, framework="pt") as file:
        done.places |= dict.fromkeys(file.keys(), made.path.name)
    done.files[made.path.name] = facts_of_file(made.path)


Known = dict[str, FileFacts]
"""What a manifest is to say of files that others wrote."""


@contextmanager
def opened_by_all(
    group: Group, what: str, folder: Path, facts: dict[str, Any] | None = None
) -> Iterator[tuple[Path, Known, Callable[[], None]]]:
    """A folder aside that all write into, what its manifest will say of their files, and what gives it its name."""
    known: Known = {}
    with ExitStack() as stack:

        def begin() -> str:
            if not folder.parent.is_dir():
                raise DiskError(f"{folder.parent} is gone; it was there when the run began. {what} is not written.")
            return str(stack.enter_context(write_whole(folder, facts, replace=True, known=known)))

        yield Path(group.on_main(f"a folder for {what}", begin)), known, stack.close


def refuse_problems(told: Sequence[Mapping[str, Any]], words: Callable[[list[str]], list[str]]) -> None:
    """Raise OSError for what the disks of processes met, TrainingError, in `words`, for tensors that came out
    otherwise."""
    if problems := [one["problem"] for one in told if one["problem"]]:
        raise OSError("; ".join(problems))
    if wrong := [name for one in told for name in one["wrong"]]:
        raise TrainingError(words(wrong))


def complete(
    model: Any, dtype: torch.dtype, aside: Path, known: Known, told: Sequence[Mapping[str, Any]], total: int
) -> None:
    """Write what transformers has beside the weights: configs, and an index of several files. total: how many numbers
    the model has."""
    places = {tensor: file for one in told for tensor, file in one["places"].items()}
    known.update({name: FileFacts(**facts) for one in told for name, facts in one["files"].items()})
    if len(known) > 1:
        about = {"total_parameters": total, "total_size": sum(one["bytes"] for one in told)}
        write_json(aside / INDEX, {"metadata": about, "weight_map": dict(sorted(places.items()))})
    own = aside / "beside"
    WholeModel(max_shard_size=ONE_FILE).save(model, {"nothing": torch.zeros(1)}, dtype, own)
    (own / "model.safetensors").unlink()
    for path in own.iterdir():
        path.rename(aside / path.name)
    own.rmdir()


def agree(group: Group, work: Callable[[], None]) -> None:
    """Do `work` in every process; raise TrainingError in all where it raised one in any."""
    problems: list[str] = []
    try:
        work()
    except TrainingError as error:
        problems = error.problems
    if found := [line for some in group.gather(problems) for line in some]:
        raise TrainingError(list(dict.fromkeys(found)))
