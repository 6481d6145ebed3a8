"""Checkpoints as folders: everything a run needs to go on, whole or not there.

checkpoints/step-N/
  model.safetensors      weights as the optimizer moves them (float32 masters where the model computes in bfloat16)
  optimizer.safetensors  the optimizer's tensors
  model-rankN.safetensors, optimizer-rankN.safetensors   instead, where each process holds pieces
  trainer.json           step, seed, best validation loss, fingerprints, versions
  recipe.yaml            the recipe of the run
  manifest.json          size and sha256 of each file
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training_hub.errors import CheckpointError
from training_hub.folders import FileFacts, damage, manifest, remove, tidy, write_whole

STEP_FOLDER = re.compile(r"^step-(\d+)$")
TRAINER_VERSION = 1
WEIGHTS, OPTIMIZER, FACTS, RECIPE = "model.safetensors", "optimizer.safetensors", "trainer.json", "recipe.yaml"


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def steps_in(root: Path) -> list[int]:
    """Steps that have a folder, ascending; by name, never by time of change."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for path in root.iterdir() if (m := STEP_FOLDER.match(path.name)))


@contextmanager
def write_checkpoint(
    root: Path,
    step: int,
    facts: Mapping[str, Any],
    recipe_yaml: str,
    known: Mapping[str, FileFacts] | None = None,
) -> Iterator[Path]:
    """Hand out a folder for the tensors, which becomes step-N on a clean exit, with `facts` and the recipe.

    known: what the manifest says of files that others wrote into it, flushed and hashed; looked up at the end.
    """
    if not root.parent.is_dir():  # to make it again would be a run folder without recipe or metrics
        raise FileNotFoundError(f"{root.parent} is gone; it was there when the run began")
    with write_whole(step_folder(root, step), {"step": step}, replace=True, known=known) as aside:
        yield aside
        content = {"version": TRAINER_VERSION, "step": step, **facts}
        (aside / FACTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (aside / RECIPE).write_text(recipe_yaml, encoding="utf-8")


def newest_valid(root: Path, say: Callable[[str], None]) -> int | None:
    """The newest step whose files are all as written. Damaged ones are named, and left where they are.

    What a killed process left unfinished is cleared away first. Raises CheckpointError where checkpoints exist and none
    is whole.
    """
    tidy(root)
    steps = steps_in(root)
    found: list[str] = []
    for step in reversed(steps):
        problems = damage(step_folder(root, step)) or _misnamed(root, step)
        if not problems:
            return step
        found += problems
        say(f"checkpoint step-{step} is damaged and passed over: {'; '.join(problems)}")
    if not steps:
        return None
    remedy = "No checkpoint is whole. Set checkpoint.resume: restart to begin anew; what is there is moved aside."
    raise CheckpointError([*found, remedy])


def facts_of(folder: Path) -> dict[str, Any]:
    """What was noted beside the tensors of a checkpoint. Raises CheckpointError for another version's."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts.get("version") != TRAINER_VERSION:
        raise CheckpointError(
            f"{folder}: written in format {facts.get('version')}, this version reads {TRAINER_VERSION}. "
            "Use the version that wrote it, or set checkpoint.resume: restart."
        )
    return facts


def prune(root: Path, newest: int, keep_last: int | None, protected: Collection[int] = ()) -> None:
    """Remove what is older than the `keep_last` newest up to step `newest`, never one of the steps `protected`."""
    if keep_last is None:
        return
    # A step beyond the newest was passed over as damaged when the run went on; it must not count as a kept one.
    for step in [step for step in steps_in(root) if step <= newest][:-keep_last]:
        if step not in protected:
            remove(step_folder(root, step))


def _misnamed(root: Path, step: int) -> list[str]:
    inside = manifest(step_folder(root, step)).get("step")
    return [] if inside == step else [f"{step_folder(root, step)} holds step {inside}"]
