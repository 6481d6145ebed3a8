"""Proofs before the first step, by JAX: what training relies on, tried on the user's own model and rows.

Nothing that a run goes on with is changed: gradients are dropped, and updates are made to copies.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from training_hub.backends.jax_engine.batches import CHUNK
from training_hub.backends.jax_engine.export import Beside, generation_stops, logits, saved_format, write_model
from training_hub.backends.jax_engine.loop import Run, Tree, accumulate, side_by_sides
from training_hub.backends.jax_engine.optim import Updater
from training_hub.backends.jax_engine.processes import whole
from training_hub.backends.shared.proofs import (
    MOVED,
    SAMPLES,
    SMALL_RATE,
    alone,
    compared,
    excerpt,
    last_trained,
    relative,
    stop_proofs,
    text_proof,
)
from training_hub.data.agreement import Agreement
from training_hub.data.packing import pack
from training_hub.errors import TrainingError
from training_hub.types import Pack, Proof, Sample

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative difference of two losses that rounding explains; gradients are allowed ten times as much."""

LOGITS_APART = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""Difference of logits, as a share of the largest, that the coarser format, of training or of the file, makes."""

COPIED_NUMBERS = 2**24
EXPORTED_AT_START_BYTES = 2**28
"""A larger model is not written before the first step of a run: the final one is read again and compared anyway."""

assert SAMPLES * 64 <= CHUNK  # what is tried fits into the smallest size of packs


@dataclass(frozen=True)
class Subject:
    """What the proofs are about. dtype: what is computed in. attention: what was found when it was chosen.

    source: the folder of the model; scratch: a folder that exists. ending_ids: every token that is special.
    """

    run: Run
    dtype: str
    attention: Proof
    agreement: Callable[[], Agreement]
    beside: Beside
    ending_ids: Sequence[int]
    source: Path
    scratch: Path


def prove(subject: Subject) -> list[Proof]:
    """Every proof, in the order in which one rests on another."""
    run = subject.run
    proofs = [text_proof(subject.agreement()), *_stops(subject), _finite_weights(run)]
    if proofs[-1].status == "fails":
        return proofs
    proofs.append(subject.attention)
    excerpts = [excerpt(run.feed.store[index]) for index in range(min(SAMPLES, len(run.feed.store)))]
    if not math.isfinite(sum(_loss(run, one) for one in alone(excerpts))):
        remedy = "training.on_nonfinite decides at the step that meets them."
        return [*proofs, Proof("the loss is finite", "left out", "the loss of the first samples is not", "", remedy)]
    gradients, loss = _parts(run, alone(excerpts))
    proofs += [_packed(subject, excerpts), _fast_loss(subject, excerpts, gradients, loss)]
    proofs += [_accumulation(subject, excerpts, gradients, loss), _moved(run, gradients)]
    return [*proofs, _saved(subject)]


def _stops(subject: Subject) -> list[Proof]:
    if subject.run.recipe.data.pretraining:
        return stop_proofs(None, set(), ())
    with tempfile.TemporaryDirectory(dir=subject.scratch, prefix=".preflight-") as folder:
        stops = generation_stops(subject.source, Path(folder), subject.beside.stop_ids)
    return stop_proofs(last_trained(subject.run.feed.store), stops, subject.ending_ids)


def _finite_weights(run: Run) -> Proof:
    name, limit = "every weight is a finite number", "0"
    everything = {**run.frozen, **run.trained}
    wrong = {key: int((~np.isfinite(whole(weight))).sum()) for key, weight in everything.items()}
    held = [f"{key} holds {count:,} numbers that are not finite" for key, count in wrong.items() if count]
    if not held:
        return Proof(name, "holds", "0 are not", limit)
    remedy = f"{'; '.join(held[:5])}. Fetch the model again: nothing trained from these weights could be used."
    return Proof(name, "fails", f"{sum(wrong.values()):,} are not", limit, remedy)


def _packed(subject: Subject, excerpts: Sequence[Sample]) -> Proof:
    name, run, limit = "packed samples are as if alone", subject.run, TOLERANCE[subject.dtype]
    silent = [Sample(one.ids, np.zeros_like(one.weights), one.origin) for one in excerpts]
    places = list(range(len(excerpts)))
    packs = [pack([*silent[:at], excerpts[at], *silent[at + 1 :]], places) for at in places]
    difference = relative([_loss(run, one) for one in packs], [_loss(run, one) for one in alone(excerpts)])
    if difference <= limit:
        return Proof(name, "holds", f"{difference:.1e}", f"{limit:.0e}")
    return Proof(name, "fails", f"{difference:.1e}", f"{limit:.0e}", "Write data.packing: false.")


def _fast_loss(subject: Subject, excerpts: Sequence[Sample], gradients: Tree, loss: float) -> Proof:
    """Loss and gradients of the objective against the same from the logits of every position."""
    run, plain, total = subject.run, subject.run.steps.nothing(subject.run.trained), 0.0
    for _, arrays in side_by_sides(run, alone(excerpts)):
        plain, value = run.steps.whole(run.trained, run.frozen, plain, arrays)
        total += float(value)
    remedy = "Report the model and its versions; training it would be wrong as it is."
    return _verdict(subject, "fast loss is the plain one", (gradients, loss), (plain, total), remedy)


def _accumulation(subject: Subject, excerpts: Sequence[Sample], gradients: Tree, loss: float) -> Proof:
    run = subject.run
    together = [pack(excerpts, range(len(excerpts)))] if run.feed.settings.is_packed else alone(excerpts)
    total, whole = accumulate(run, together)
    remedy = "Write data.packing: false, and report the model."
    return _verdict(subject, "accumulation leaves loss and gradient", (whole, total), (gradients, loss), remedy)


def _verdict(subject: Subject, name: str, one: tuple[Tree, float], other: tuple[Tree, float], remedy: str) -> Proof:
    loss = abs(one[1] - other[1]) / max(abs(other[1]), 1e-12)
    here, there = ({key: whole(each).astype(np.float64) for key, each in some[0].items()} for some in (one, other))
    apart = _norm({key: here[key] - there[key] for key in here}) / max(_norm(there), 1e-30)
    return compared(name, loss, apart, TOLERANCE[subject.dtype], remedy)


def _moved(run: Run, gradients: Tree) -> Proof:
    """Share of weights with a gradient that one update at a tiny rate moves, on copies of as many as fit."""
    settings = run.recipe.optimizer.model_copy(update={"lr": SMALL_RATE, "weight_decay": 0.0})
    name, limit = f"an update at {SMALL_RATE:.0e} moves weights", MOVED.get(settings.name, 0.0)
    room, chosen = COPIED_NUMBERS, []
    for key, weight in run.trained.items():
        if weight.size <= room:
            chosen.append(key)
            room -= weight.size
    if not chosen:
        return Proof(name, "left out", "", f"above {limit:.0%}", "every weight is too large to copy")
    before = {key: run.trained[key] for key in chosen}
    has_gradient = {key: whole(gradients[key]) != 0 for key in chosen}
    is_whole = len(chosen) == len(run.trained) and run.recipe.optimizer.weight_decay == 0
    small = Updater(settings, run.recipe.training.max_norm, pin=run.mesh.pin, tables=run.updater.tables)
    updater = run.updater if is_whole else small
    copies = {key: jnp.copy(before[key]) for key in chosen}
    slopes = {key: gradients[key] for key in chosen}
    norm = updater.norm(slopes, 1.0)
    after, _ = updater.step(
        copies, updater.begin(before), slopes, run.frozen, norm, np.float32(1), np.float32(SMALL_RATE)
    )
    moved = {key: whole(after[key]) != whole(before[key]) for key in chosen}
    changed = sum(int((moved[key] & has_gradient[key]).sum()) for key in chosen)
    share = changed / max(1, sum(int(each.sum()) for each in has_gradient.values()))
    remedy = "" if share > limit else "Weights this precise cannot be trained: write model.dtype: auto."
    return Proof(name, "holds" if share > limit else "fails", f"{share:.1%} of weights", f"above {limit:.0%}", remedy)


def _saved(subject: Subject) -> Proof:
    name, run = "saved and loaded gives the same logits", subject.run
    if sum(weight.nbytes for weight in run.trained.values()) > EXPORTED_AT_START_BYTES:
        return Proof(name, "left out", "", "", "done with the final model")
    scale = max(float(np.abs(whole(logits(run, run.trained, run.frozen))).max()), 1e-12)
    with tempfile.TemporaryDirectory(dir=subject.scratch, prefix=".preflight-") as folder:
        try:
            difference = write_model(run, subject.beside, Path(folder) / "model") / scale
        except TrainingError as error:
            return Proof(name, "fails", "another model", "the same", str(error))
    limit = max(LOGITS_APART[subject.dtype], LOGITS_APART.get(saved_format(run, subject.beside), 1e-3))
    remedy = "" if difference <= limit else "Report the model and its versions, or write model.save_dtype: float32."
    return Proof(name, "fails" if remedy else "holds", f"{difference:.1e}", f"{limit:.0e}", remedy)


def _loss(run: Run, one: Pack) -> float:
    # By the program of the step, which is compiled already; another one would take longer than the gradient.
    return accumulate(run, [one])[0]


def _parts(run: Run, packs: Sequence[Pack]) -> tuple[Tree, float]:
    """Gradients and loss, one pack at a time."""
    total, gradients = accumulate(run, packs)
    return gradients, total


def _norm(gradients: Mapping[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(gradient).sum()) for gradient in gradients.values()))
