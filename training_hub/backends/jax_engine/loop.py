"""The loop of the jax engine: what happens in one run, step by step. It parallels that of the torch engine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from training_hub.backends.jax_engine.batches import Arrays, Sizes, side_by_side
from training_hub.backends.jax_engine.by_source import BySource
from training_hub.backends.jax_engine.checkpoints import Checkpoints
from training_hub.backends.jax_engine.exam import ask
from training_hub.backends.jax_engine.full import Adaptation
from training_hub.backends.jax_engine.generate import Speech
from training_hub.backends.jax_engine.mesh import Mesh
from training_hub.backends.jax_engine.noise import noise_of
from training_hub.backends.jax_engine.optim import Updater
from training_hub.backends.jax_engine.processes import ALONE, Group, placed, whole
from training_hub.backends.jax_engine.step import Steps
from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.due import is_evaluation_due, is_saving_due, measured
from training_hub.backends.shared.errors import Lost, broken, interrupted, listed, not_finite
from training_hub.backends.shared.exam import Exam, told
from training_hub.backends.shared.freezing import Turns
from training_hub.backends.shared.packs import reported
from training_hub.backends.shared.signals import StopRequest
from training_hub.backends.shared.watch import Watch
from training_hub.data.feed import Feed, validation_packs
from training_hub.data.packing import pack
from training_hub.data.store import TokenStore
from training_hub.errors import TrainingError
from training_hub.evaluation.best import Best
from training_hub.evaluation.metrics import perplexity
from training_hub.monitoring.throughput import ThroughputMeter, memory_gib
from training_hub.recipe import Recipe
from training_hub.recipe.load import dump
from training_hub.recipe.schedule import learning_rate
from training_hub.types import Batch, Console, Pack, StepReport

Tree = dict[str, Array]

PADDED = "padded_fraction"
"""What the share of padding among all places of a step's packs is called."""


@dataclass
class Run:
    """A run in progress: its parts, and the little that changes.

    trained: what the optimizer moves, frozen: what stays; together the model. state: what the optimizer keeps. turns:
    what passes from one to the other as the run goes on. speech: by which the model answers its exam. stop_reason: what
    a watcher of the user's ends it for. scale is what the torch engine has beside: a measure of operations.
    """

    recipe: Recipe
    steps: Steps
    adaptation: Adaptation
    trained: Tree
    frozen: Tree
    updater: Updater
    state: Any
    feed: Feed
    sizes: Sizes
    mesh: Mesh
    validation: TokenStore | None
    checkpoints: Checkpoints
    console: Console
    facts: dict[str, Any]
    best: Best
    speech: Speech
    group: Group = ALONE
    engine: str = "jax"
    step: int = 0
    skipped_in_row: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    validation_before: float | None = None
    watch: Watch | None = None
    by_source: BySource | None = None
    validation_sets: BySource | None = None
    packs_validation: bool = True
    stop_reason: str = ""
    turns: Turns = field(default_factory=Turns)
    exam: Exam | None = None
    scale: None = None


def train(run: Run, stop: StopRequest) -> Iterator[StepReport]:
    """One report for each optimizer step from where the run stands to its end.

    A step is reported before it is saved, so that the metrics never miss a step that a checkpoint holds. Raises
    Interrupted, with the state saved, at the first step boundary after a signal. Ends early, after a step that is
    reported and not saved, where the watch has a reason to.
    """
    meter = ThroughputMeter(run.feed.total_steps, first_step=run.step)
    before_first_step(run)
    while run.step < run.feed.total_steps:
        report = take_step(run, meter)
        run.step = report.step
        if run.validation is not None and is_evaluation_due(run):
            report = validate(run, run.validation, report)
        is_watched = run.watch is not None and run.watch.is_due(run.step, run.feed)
        if run.watch is not None and is_watched:
            report = replace(report, measures={**report.measures, **run.watch.look(run.step, run.console)})
        yield report
        if run.watch is not None and run.watch.reason:
            run.console.say(f"stopped: {run.watch.reason}")
            return
        is_best = report.validation_loss is not None and run.best.note(measured(report), run.step)
        is_due = is_saving_due(run, is_watched) or (is_best and run.recipe.checkpoint.keep_best)
        # Clocks differ, and a signal may have reached one process only: what one is asked for, all do.
        asked = [stop.number or 0, int(is_due), int(bool(run.stop_reason))]
        number, must_save, must_end = run.group.highest(f"the end of step {run.step}", asked)
        if number or must_save:
            save(run)
            number = run.group.highest("the checkpoint", [stop.number or 0])[0]  # one may have come while it was saved
        if run.step < run.feed.total_steps:
            run.stop_reason = run.stop_reason or ("a callback of the first process ended it" if must_end else "")
            if reason := run.best.reason or run.stop_reason:
                run.console.say(f"stopped: {reason}")
                return
            if number:
                raise interrupted(number, run.step, run.feed.total_steps, run.checkpoints.folder(run.step))


def before_first_step(run: Run) -> None:
    """Measure what later steps are compared with."""
    if run.step == 0 and run.exam is not None:
        run.group.on_main("answers of another run", run.exam.clear)
    if run.step == 0 and run.validation is not None and run.recipe.evaluation.at_start:
        before = run.validation_before = evaluate(run, run.validation)
        run.console.say(f"validation before training: loss {before:.4f}, perplexity {perplexity(before):.2f}")
        if run.exam is not None:
            run.exam.before = take_exam(run, run.exam, 0)
            run.console.say(f"answers before training: {told(run.exam.before)}")
    if run.watch is not None and run.watch.before is None:
        run.watch.begin(run.step, run.console)


def take_step(run: Run, meter: ThroughputMeter) -> StepReport:
    """Forward, backward and update on the next batch; the loss is a sum divided once by its trained weight."""
    began = time.perf_counter()
    batch = next_batch(run)
    begin_turns(run, batch.step)
    total, gradients = accumulate(run, batch.packs, batch.step)
    loss = total / batch.trained_weight
    norm = run.updater.norm(gradients, batch.trained_weight)
    grad_norm = float(norm)
    rate = learning_rate(run.recipe.lr_scheduler, run.recipe.optimizer.lr, batch.step, run.feed.total_steps)
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if is_finite:
        update(run, gradients, norm, batch.trained_weight, rate)
    elif run.recipe.training.on_nonfinite == "stop" or nonfinite(run.trained):
        raise lost(run, batch, loss, grad_norm)  # no later step would be finite, so there is none to skip to
    run.skipped_in_row = 0 if is_finite else run.skipped_in_row + 1
    if run.skipped_in_row >= run.recipe.training.max_skipped:
        raise lost(run, batch, loss, grad_norm)
    seconds = time.perf_counter() - began
    return reported(
        batch,
        meter,
        run.feed.total_steps,
        seconds,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        memory_gib=memory_gib(),
        skipped=not is_finite,
        measures={
            PADDED: run.sizes.padded_fraction(batch.packs, run.mesh.rows),
            **(run.by_source.means() if run.by_source is not None else {}),
        },
    )


def begin_turns(run: Run, step: int) -> None:
    """Let that train which is to train in step `step` (from 1), and nothing else; what begins has no moments before."""
    waiting = run.turns.waiting(step)
    begun = {name: run.frozen[name] for _, names in run.turns.turns for name in names if name in run.frozen}
    begun = {name: weight for name, weight in begun.items() if name not in waiting}
    stopped = {name: run.trained[name] for name in waiting if name in run.trained}
    if not begun and not stopped:
        return
    run.trained = {**{name: one for name, one in run.trained.items() if name not in stopped}, **begun}
    run.frozen = {**{name: one for name, one in run.frozen.items() if name not in begun}, **stopped}
    run.state = {**{name: one for name, one in run.state.items() if name not in stopped}, **run.updater.begin(begun)}
    run.console.say(run.turns.told(step))


def next_batch(run: Run) -> Batch:
    """The batch of the next step, its samples dealt out to the packs that go through the devices side by side."""
    rows = run.mesh.rows
    dealt = [run.feed.batch(run.step + 1, row, rows) for row in range(rows)]
    packs = [pack for side in zip_longest(*(one.packs for one in dealt)) for pack in side if pack is not None]
    return replace(dealt[0], packs=tuple(packs))


def accumulate(run: Run, packs: Sequence[Pack], step: int | None = None) -> tuple[float, Tree]:
    """The sum of the packs' weighted losses, and the sums of its gradients, on the device; with the dropout of `step`,
    without any where none is named."""
    sums = run.steps.nothing(run.trained)
    totals, losses = [], []
    groups = list(side_by_sides(run, packs, step))
    for _, arrays in groups:
        sums, total, each = run.steps.add(run.trained, run.frozen, sums, arrays)
        totals.append(total)
        losses.append(each)
    if run.by_source is not None:
        run.by_source.begin()
        for (some, _), each in zip(groups, losses, strict=True):
            run.by_source.add(some, whole(each))
    return math.fsum(float(total) for total in totals), sums


def side_by_sides(
    run: Measured, packs: Sequence[Pack], step: int | None = None
) -> Iterator[tuple[Sequence[Pack], Arrays]]:
    """The packs in groups that go through the devices at once, with the noise of `step` where one is named."""
    rows = run.mesh.rows
    for start in range(0, len(packs), rows):
        some = packs[start : start + rows]
        arrays = run.mesh.spread(side_by_side(some, run.sizes, rows))
        if step is not None and run.steps.forward.build.rates.is_any:
            arrays = replace(arrays, noise=noise_of(some, arrays.positions, run.recipe.seed, step))
        yield some, arrays


def update(run: Run, gradients: Tree, norm: Array, trained_weight: float, rate: float) -> None:
    """Move the weights by the sums of gradients of a step, whose mean has this norm."""
    run.trained, run.state = run.updater.step(
        run.trained, run.state, gradients, run.frozen, norm, np.float32(trained_weight), np.float32(rate)
    )
    jax.block_until_ready(run.trained)


def validate(run: Run, store: TokenStore, report: StepReport) -> StepReport:
    """The report with what the validation rows say: their loss, of each of several sets too, and scores of answers
    where these are asked for."""
    sets, measures = run.validation_sets, report.measures
    if sets is not None:
        sets.begin()
    loss = evaluate(run, store, sets=sets)
    if sets is not None:
        measures = {**measures, **sets.means()}
    scores = take_exam(run, run.exam, run.step) if run.exam is not None else {}
    doubt = perplexity(loss)
    return replace(report, validation_loss=loss, validation_perplexity=doubt, scores=scores, measures=measures)


def take_exam(run: Run, exam: Exam, step: int) -> dict[str, float]:
    """The scores of the answers at this step."""
    what = f"answers at step {step}"
    given = ask(exam.examiner, run.speech, (run.trained, run.frozen), run.console, what)
    exam.last = run.group.on_main(what, lambda: exam.note(given, step, run.console))
    return dict(exam.last)


class Measured(Protocol):
    """What can be measured on rows: a run, or a saved model."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def steps(self) -> Steps: ...

    @property
    def trained(self) -> Tree: ...

    @property
    def frozen(self) -> Tree: ...

    @property
    def feed(self) -> Feed: ...

    @property
    def sizes(self) -> Sizes: ...

    @property
    def mesh(self) -> Mesh: ...

    @property
    def console(self) -> Console: ...

    @property
    def packs_validation(self) -> bool: ...


def evaluate(run: Measured, store: TokenStore, what: str = "validation", sets: BySource | None = None) -> float:
    """Mean cross-entropy over the trained tokens of all of `store`, in nats; `sets` gathers that of each set."""
    totals = []
    packs = list(validation_packs(store, run.feed.settings.token_budget, run.packs_validation))
    with run.console.progress(what, total=int(store.lengths.sum()), unit="tokens") as advance:
        for some, arrays in side_by_sides(run, packs):
            total, losses = run.steps.total(run.trained, run.frozen, arrays)
            totals.append(float(total))
            if sets is not None:
                sets.add(some, whole(losses))
            advance(sum(len(one) for one in some))
    return math.fsum(totals) / float(store.trained_weight.sum())


def dry_step(run: Run) -> None:
    """Forward and backward on the largest pack, so that memory runs out in minute one or not at all."""
    accumulate(run, [run.feed.largest_pack()], 0)


def save(run: Run) -> None:
    """Write a checkpoint of the step the run has reached, once. Raises TrainingError for weights that are broken."""
    if run.saved_step == run.step and run.step > 0:
        return
    fetch = partial(whole, is_kept=run.group.is_main)
    weights = {name: fetch(weight) for name, weight in moving(run).items()}
    optimizer = run.updater.named(run.state, run.trained, fetch)
    run.group.on_main("saving", lambda: _write(run, weights, optimizer))
    run.saved_at, run.saved_step = time.monotonic(), run.step


def _write(run: Run, weights: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]) -> None:
    if problems := nonfinite({**weights, **optimizer}):
        raise broken(problems, run.step, run.recipe, run.checkpoints.steps())
    best = run.best.step if run.recipe.checkpoint.keep_best else None
    kept = run.watch.kept if run.watch is not None else None
    facts = {
        **run.facts,
        "engine": run.engine,
        "best": run.best.state(),
        "exam": run.exam.state() if run.exam is not None else None,
        "validation_before": run.validation_before,
        "seed": run.recipe.seed,
        "skipped_in_row": run.skipped_in_row,
        "watch": run.watch.state() if run.watch is not None else None,
    }
    size = sum(array.nbytes for array in (*weights.values(), *optimizer.values()))
    protected = [step for step in (best, kept) if step is not None]
    with disk_errors_explained(f"checkpoint step-{run.step}", run.checkpoints.folder(run.step), size):
        run.checkpoints.save(run.step, weights, optimizer, facts, dump(run.recipe), protected)


def resume(run: Run, step: int) -> None:
    """Put the run where checkpoint `step` was taken; that it is this run's has been seen before."""
    weights, optimizer, facts = run.checkpoints.load(step)
    begin_turns(run, step)
    take_weights(run, weights)
    run.state = run.updater.like(run.state, run.trained, optimizer)
    run.step = run.saved_step = step
    run.best.load(facts.get("best") or {})
    if run.exam is not None:
        run.exam.load(facts.get("exam") or {})
    run.validation_before = facts.get("validation_before")
    run.skipped_in_row = facts.get("skipped_in_row", 0)
    if run.watch is not None:
        run.watch.load(facts.get("watch") or {})


def moving(run: Run) -> Tree:
    """The weights that train at some time of the run."""
    return {name: run.trained[name] if name in run.trained else run.frozen[name] for name in run.adaptation.shapes()}


def take_weights(run: Run, weights: Mapping[str, np.ndarray]) -> None:
    """Take the weights of a checkpoint for what trains, now or later."""
    taken = {name: placed(weights[name], held.sharding) for name, held in moving(run).items()}
    run.trained = {name: taken[name] for name in run.trained}
    run.frozen = {name: taken.get(name, held) for name, held in run.frozen.items()}


def lost(run: Run, batch: Batch, loss: float, grad_norm: float) -> TrainingError:
    """The error about a step whose loss or gradient is not finite; names the rows that do it alone."""
    indices = [int(index) for one in batch.packs for index in one.samples]
    guilty = [index for index in indices if not math.isfinite(_loss_alone(run, index))]
    who = "Rows whose own loss is not finite" if guilty else "No row does it alone; rows of the step"
    shown = listed([str(run.feed.store.origin(index)) for index in guilty or indices])
    what = Lost(batch.step, loss, grad_norm, f"{who}: {shown}")
    return not_finite(what, run.recipe, run.skipped_in_row, run.checkpoints.steps())


def _loss_alone(run: Run, index: int) -> float:
    (_, arrays), *_ = side_by_sides(run, [pack([run.feed.store[index]], [index])])
    return float(run.steps.objective(run.trained, run.frozen, arrays)[0])


def nonfinite(arrays: Mapping[str, Any]) -> list[str]:
    """One line for each array with NaN or infinite numbers; [] where there is none."""
    counts = {name: int((~np.isfinite(np.asarray(whole(array), np.float32))).sum()) for name, array in arrays.items()}
    return [f"{name} holds {count:,} numbers that are not finite" for name, count in counts.items() if count]
