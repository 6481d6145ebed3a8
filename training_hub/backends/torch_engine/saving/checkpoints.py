"""Checkpoints of the torch engine: the tensors in them, which lie as `shared.checkpoint_folders` tells.

Random state is not among them because there is none: dropout is seeded by (seed, step), batches are a function of
(data, recipe, seed, step), the learning rate of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from training_hub.backends.shared.checkpoint_folders import (
    OPTIMIZER,
    WEIGHTS,
    facts_of,
    newest_valid,
    prune,
    step_folder,
    steps_in,
    write_checkpoint,
)
from training_hub.backends.torch_engine.layouts.pieces import Cut, whole_cut
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.tensor_files import (
    Pieces,
    files_of,
    opened,
    piece_file,
    write_pieces,
    write_whole_tensors,
)
from training_hub.folders import FileFacts, facts_of_file

Shape = tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What a checkpoint holds. `facts` is plain JSON: step, seed, best, fingerprints, versions."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class OpenStep:
    """A step in the making, in a folder that has no name yet. give_name: for process 0, once all have written.

    known: what the manifest will say of the files of all.
    """

    folder: Path
    rank: int
    known: dict[str, FileFacts]
    give_name: Callable[[], None]

    def write(self, own: Mapping[str, Pieces]) -> dict[str, Any]:
        """Write the pieces of a process; what the manifest says of its files, or the problem it met, as plain JSON."""
        files = {}
        try:
            for name, pieces in own.items():
                if not pieces.tensors:
                    continue
                path = self.folder / piece_file(name, self.rank)
                write_pieces(path, pieces)
                files[path.name] = asdict(facts_of_file(path))
        except (OSError, SafetensorError) as error:
            return {"problem": f"rank {self.rank}: {error}", "files": {}}
        return {"problem": "", "files": files}

    def take(self, told: Iterable[dict[str, Any]]) -> None:
        """Note what `write` gave in each process. Raises OSError where the disk refused one of them."""
        for one in told:
            if one["problem"]:
                raise OSError(one["problem"])
            self.known.update({name: FileFacts(**facts) for name, facts in one["files"].items()})


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, root: Path, keep_last: int | None = None):
        self.root = root
        self.keep_last = keep_last

    def save(self, state: State, recipe_yaml: str, protected: Collection[int] = ()) -> Path:
        """Write step-N, then remove what is older than `keep_last`, never one of the steps `protected`.

        Raises OSError or SafetensorError where the disk refuses; earlier checkpoints are then as they were.
        """
        with write_checkpoint(self.root, state.step, state.facts, recipe_yaml) as aside:
            write_whole_tensors(aside / WEIGHTS, state.weights)
            write_whole_tensors(aside / OPTIMIZER, state.optimizer)
        prune(self.root, state.step, self.keep_last, protected)
        return self.folder(state.step)

    def save_together(
        self,
        state: State,
        own: Mapping[str, Pieces],
        recipe_yaml: str,
        group: Group,
        protected: Collection[int] = (),
    ) -> None:
        """The same by several processes, each of which writes its `own` pieces ("model", "optimizer") and hashes them.

        The step gets its name once all have written. Raises, in every process, where the disk refuses one of them.
        """
        with self.opened_together(state, recipe_yaml, group, protected) as step:
            step.take(group.gather(step.write(own)))
            group.on_main(f"saving step {state.step}", step.give_name)

    @contextmanager
    def opened_together(
        self, state: State, recipe_yaml: str, group: Group, protected: Collection[int] = ()
    ) -> Iterator[OpenStep]:
        """A step that all processes write into, each its pieces. All must call this; it is gone at an error."""
        known: dict[str, FileFacts] = {}
        with ExitStack() as stack:

            def begin() -> str:
                aside = write_checkpoint(self.root, state.step, state.facts, recipe_yaml, known)
                return str(stack.enter_context(aside))

            def give_name() -> None:
                stack.close()
                prune(self.root, state.step, self.keep_last, protected)

            folder = Path(group.on_main(f"a folder for step {state.step}", begin))
            yield OpenStep(folder, group.rank, known, give_name)

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; by name, never by time of change."""
        return steps_in(self.root)

    def folder(self, step: int) -> Path:
        return step_folder(self.root, step)

    def newest_valid(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose files are all as written. Damaged ones are named, and left where they are.

        What a killed process left unfinished is cleared away first. Raises CheckpointError where checkpoints exist and
        none is whole.
        """
        return newest_valid(self.root, say)

    def load(
        self, step: int, wanted: Callable[[str, Shape], Cut | None] = lambda name, shape: whole_cut(shape)
    ) -> State:
        """The state saved at `step`, on the CPU. Call `newest_valid` first: this does not check sums again.

        wanted: the part that is read of each tensor, by its name and whole shape, None where it is left out; however
        many processes wrote it.
        """
        parts = []
        for name in ("model", "optimizer"):
            with opened(files_of(self.folder(step), name)) as files:
                cuts = {key: wanted(key, shape) for key, shape in files.shapes.items()}
                parts.append({key: files.read(key, cut) for key, cut in cuts.items() if cut is not None})
        return State(step, weights=parts[0], optimizer=parts[1], facts=self.facts(step))

    def facts(self, step: int) -> dict[str, Any]:
        """What was noted beside the tensors of `step`."""
        return facts_of(self.folder(step))

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights of `step`, without reading one."""
        with opened(files_of(self.folder(step), "model")) as files:
            return files.shapes
