"""Checkpoints: everything a run needs to go on, whole or not there.

    checkpoints/step-N/
      model.safetensors      weights as the optimizer moves them (float32 masters where the model computes in bfloat16)
      optimizer.safetensors  the optimizer's tensors
      model-rankN.safetensors, optimizer-rankN.safetensors   instead, where each process holds pieces
      trainer.json           step, seed, best validation loss, fingerprints, versions
      recipe.yaml            the recipe of the run
      manifest.json          size and sha256 of each file

Random state is not among them because there is none: dropout is seeded by (seed, step), batches are a function of
(data, recipe, seed, step), the learning rate of the step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from training_hub.backends.torch_engine.layouts.pieces import Cut, whole_cut
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.tensor_files import (
    Pieces,
    files_of,
    opened,
    piece_file,
    write_pieces,
    write_whole_tensors,
)
from training_hub.errors import CheckpointError
from training_hub.folders import FileFacts, damage, facts_of_file, manifest, remove, tidy, write_whole

STEP_FOLDER = re.compile(r"^step-(\d+)$")
TRAINER_VERSION = 1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What a checkpoint holds. `facts` is plain JSON: step, seed, best, fingerprints, versions."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, root: Path, keep_last: int | None = None):
        self.root = root
        self.keep_last = keep_last

    def save(self, state: State, recipe_yaml: str, protected: Collection[int] = ()) -> Path:
        """Write step-N, then remove what is older than `keep_last`, never one of the steps `protected`.

        Raises OSError or SafetensorError where the disk refuses; earlier checkpoints are then as they were.
        """
        if not self.root.parent.is_dir():  # to make it again would be a run folder without recipe or metrics
            raise FileNotFoundError(f"{self.root.parent} is gone; it was there when the run began")
        folder = self.root / f"step-{state.step}"
        with write_whole(folder, {"step": state.step}, replace=True) as aside:
            write_whole_tensors(aside / "model.safetensors", state.weights)
            write_whole_tensors(aside / "optimizer.safetensors", state.optimizer)
            _write_facts(aside, state, recipe_yaml)
        self._prune(state.step, protected)
        return folder

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
        folder = self.root / f"step-{state.step}"
        known: dict[str, FileFacts] = {}
        with ExitStack() as stack:

            def begin() -> str:
                if not self.root.parent.is_dir():
                    raise FileNotFoundError(f"{self.root.parent} is gone; it was there when the run began")
                return str(stack.enter_context(write_whole(folder, {"step": state.step}, replace=True, known=known)))

            def end() -> None:
                _write_facts(aside, state, recipe_yaml)
                stack.close()
                self._prune(state.step, protected)

            aside = Path(group.on_main(f"a folder for step {state.step}", begin))
            for told in group.gather(_written(aside, own, group.rank)):
                if told["problem"]:
                    raise OSError(told["problem"])
                known.update({name: FileFacts(**facts) for name, facts in told["files"].items()})
            group.on_main(f"saving step {state.step}", end)

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; by name, never by time of change."""
        if not self.root.is_dir():
            return []
        return sorted(int(m[1]) for path in self.root.iterdir() if (m := STEP_FOLDER.match(path.name)))

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def newest_valid(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose files are all as written. Damaged ones are named, and left where they are.

        What a killed process left unfinished is cleared away first. Raises CheckpointError where checkpoints exist and
        none is whole.
        """
        tidy(self.root)
        steps = self.steps()
        found: list[str] = []
        for step in reversed(steps):
            problems = damage(self.folder(step)) or self._misnamed(step)
            if not problems:
                return step
            found += problems
            say(f"checkpoint step-{step} is damaged and passed over: {'; '.join(problems)}")
        if not steps:
            return None
        remedy = "No checkpoint is whole. Set checkpoint.resume: restart to begin anew; what is there is moved aside."
        raise CheckpointError([*found, remedy])

    def load(self, step: int, wanted: Callable[[str, Shape], Cut] = lambda name, shape: whole_cut(shape)) -> State:
        """The state saved at `step`, on the CPU. Call `newest_valid` first: this does not check sums again.

        wanted: the part that is read of each tensor, by its name and whole shape; however many processes wrote it.
        """
        parts = []
        for name in ("model", "optimizer"):
            with opened(files_of(self.folder(step), name)) as files:
                parts.append({key: files.read(key, wanted(key, shape)) for key, shape in files.shapes.items()})
        return State(step, weights=parts[0], optimizer=parts[1], facts=self.facts(step))

    def facts(self, step: int) -> dict[str, Any]:
        """What was noted beside the tensors of `step`."""
        folder = self.folder(step)
        facts = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        if facts.get("version") != TRAINER_VERSION:
            raise CheckpointError(
                f"{folder}: written in format {facts.get('version')}, this version reads {TRAINER_VERSION}. "
                "Use the version that wrote it, or set checkpoint.resume: restart."
            )
        return facts

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights of `step`, without reading one."""
        with opened(files_of(self.folder(step), "model")) as files:
            return files.shapes

    def _misnamed(self, step: int) -> list[str]:
        inside = manifest(self.folder(step)).get("step")
        return [] if inside == step else [f"{self.folder(step)} holds step {inside}"]

    def _prune(self, newest: int, protected: Collection[int]) -> None:
        if self.keep_last is None:
            return
        # A step beyond the newest was passed over as damaged when the run went on; it must not count as a kept one.
        for step in [step for step in self.steps() if step <= newest][: -self.keep_last]:
            if step not in protected:
                remove(self.folder(step))


def newest_saved(checkpoints: Checkpoints) -> str:
    """Which checkpoint there is to go on from, in words."""
    kept = checkpoints.steps()
    return f"the newest checkpoint is step-{kept[-1]}" if kept else "no checkpoint was due before it"


def _write_facts(folder: Path, state: State, recipe_yaml: str) -> None:
    facts = {"version": TRAINER_VERSION, "step": state.step, **state.facts}
    (folder / "trainer.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")


def _written(folder: Path, own: Mapping[str, Pieces], rank: int) -> dict[str, Any]:
    """Write the pieces of a process; what the manifest says of its files, or the problem it met, as plain JSON."""
    files = {}
    try:
        for name, pieces in own.items():
            if not pieces.tensors:
                continue
            path = folder / piece_file(name, rank)
            write_pieces(path, pieces)
            files[path.name] = asdict(facts_of_file(path))
    except (OSError, SafetensorError) as error:
        return {"problem": f"rank {rank}: {error}", "files": {}}
    return {"problem": "", "files": files}
