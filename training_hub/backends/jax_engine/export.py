"""The final model: an ordinary Hugging Face folder, checked by reading it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.full import Adaptation
from training_hub.backends.jax_engine.loop import Run, moving, nonfinite, take_weights
from training_hub.backends.jax_engine.processes import whole
from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.exam import Exam
from training_hub.backends.shared.final_folder import save_tokenizer, set_stop_ids
from training_hub.backends.shared.outcome import card_of, final_step
from training_hub.errors import DiskError, TrainingError
from training_hub.folders import write_whole
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder

PROBE_LENGTH = 16


@dataclass(frozen=True)
class Beside:
    """What the final folder holds beside weights. formats: of the weights as they came, by name in memory."""

    formats: Mapping[str, str]
    tokenizer: Any
    chat_template: str | None
    stop_ids: Sequence[int]


def _show_answers(exam: Exam, step: int) -> None:
    exam.show(step)


def finish(run: Run, beside: Beside, folder: RunFolder) -> str | None:
    """Write the final model: the best one where the recipe keeps it, the last within the limit where the watch stopped
    the run; None where it stopped it before there was one."""
    if run.watch is not None and run.watch.reason:
        if run.watch.kept is None:
            return None
        take_weights(run, run.checkpoints.load(run.watch.kept)[0])
    elif run.recipe.checkpoint.keep_best and run.best.step not in (None, run.step):
        best, metric = final_step(run), run.best.settings.best_metric
        run.console.say(f"final: taking step {best}, with the best {metric} {run.best.value}")
        take_weights(run, run.checkpoints.load(best)[0])
    if run.exam is not None:
        run.group.on_main("the answers of the final model", partial(_show_answers, run.exam, final_step(run)))
    name = saved_format(run, beside)
    trained = sum(weight.size for weight in moving(run).values())
    numbers = files.count(run.steps.forward.build.shape)
    documents = card_of(run, folder, name, numbers, trained) if run.group.is_main else {}
    difference = write_model(run, beside, folder.final, documents)
    run.console.say(
        f"final: {folder.final} ({name}), loaded again and equal; logits differ from training by at most "
        f"{difference:.1e}"
    )
    return str(folder.final)


def saved_format(run: Run, beside: Beside) -> str:
    """The number format of the final model, that of most weights where each keeps its own."""
    return format_of(run.recipe, run.adaptation, beside.formats)


def format_of(recipe: Recipe, adaptation: Adaptation, formats: Mapping[str, str]) -> str:
    """The same from what it follows from. formats: of the weights as they came."""
    wanted, held = recipe.model.save_dtype, list(formats.values())
    if wanted != "auto":
        return wanted
    return adaptation.own_format or max(sorted(set(held)), key=held.count)


def write_model(run: Run, beside: Beside, folder: Path, documents: Mapping[str, bytes] | None = None) -> float:
    """Write the model as it stands into `folder`; the largest difference of logits once it is read again; atomic.

    Before the folder gets its name it is read again: every tensor must be, bit for bit, what was meant to be written.
    Raises TrainingError where it is not, or where a weight is not finite.
    """
    fetch = partial(whole, is_kept=run.group.is_main)
    trained = {name: fetch(weight) for name, weight in run.trained.items()}
    # An adapter lies in a file of its own, for which the weights beside it are not needed.
    frozen = {name: fetch(weight) for name, weight in run.frozen.items()} if run.adaptation.file is None else {}
    with ExitStack() as stack:
        begun = run.group.on_main(
            "writing the model", lambda: str(_write(run, beside, folder, documents or {}, trained, frozen, stack))
        )
        difference = _logit_difference(run, Path(begun))
        if not math.isfinite(difference):
            raise TrainingError(
                "the final model computes logits that are not finite, though its weights are: they have become too "
                "large. It is not written. Write a lower optimizer.lr, and training.on_nonfinite: stop to see the step."
            )
        run.group.on_main("the final model", stack.close)
    return difference


def _write(
    run: Run,
    beside: Beside,
    folder: Path,
    documents: Mapping[str, bytes],
    trained: dict[str, np.ndarray],
    frozen: dict[str, np.ndarray],
    stack: ExitStack,
) -> Path:
    """The folder that will be `folder` when the stack is closed, its tensors compared with what they were."""
    if not folder.parent.is_dir():
        raise DiskError(f"{folder.parent} is gone; it was there when the run began. The final model is not written.")
    wanted = run.recipe.model.save_dtype
    formats = beside.formats if wanted == "auto" else dict.fromkeys(beside.formats, wanted)
    if problems := nonfinite(trained):
        raise TrainingError([*problems, "Such a model is not written."])
    tensors = run.adaptation.tensors(trained, frozen, formats)
    size = sum(tensor.nbytes for tensor in tensors.values())
    stack.enter_context(disk_errors_explained("the final model", folder, size))
    aside = stack.enter_context(write_whole(folder, {"dtype": saved_format(run, beside)}, replace=True))
    run.adaptation.write(tensors, aside, None if wanted == "auto" else wanted)
    set_stop_ids(aside / "generation_config.json", beside.stop_ids)
    save_tokenizer(beside.tokenizer, beside.chat_template, aside)
    for name, content in documents.items():
        (aside / name).write_bytes(content)
    _verify(run, aside, tensors)
    return aside


def generation_stops(source: Path, scratch: Path, stop_ids: Sequence[int]) -> set[int]:
    """The ids at which generate() would stop, by the file that `write_model` writes."""
    path = scratch / "generation_config.json"
    known = source / "generation_config.json"
    path.write_text(known.read_text(encoding="utf-8") if known.exists() else "{}", encoding="utf-8")
    set_stop_ids(path, stop_ids)
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    path.unlink()
    return {stops} if isinstance(stops, int) else set(stops or ())


def _verify(run: Run, folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    found = dict(files.read_all(folder, run.adaptation.file))
    problems = [f"{name} is not what was written" for name in tensors if not _is_same(tensors[name], found.get(name))]
    problems += [f"{name} is not of the model" for name in found if name not in tensors]
    if problems:
        raise TrainingError([f"the final model does not load as it was trained: {line}" for line in problems])


def _is_same(one: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _logit_difference(run: Run, folder: Path) -> float:
    loaded = run.mesh.place(run.adaptation.read(folder, run.console))
    here, there = (whole(logits(run, trained, run.frozen)) for trained in (run.trained, loaded))
    return float(np.abs(here - there).max())


def logits(run: Run, trained: Any, frozen: Any) -> Any:
    """[B, T, V]: what the model of these weights says of a few tokens."""
    shape = run.steps.forward.build.shape
    ids = (np.arange(PROBE_LENGTH, dtype=np.int32) % shape.vocabulary)[None].repeat(run.mesh.rows, axis=0)
    positions = np.arange(PROBE_LENGTH, dtype=np.int32)[None].repeat(run.mesh.rows, axis=0)
    return run.steps.logits(trained, frozen, ids, positions, np.ones_like(ids))
