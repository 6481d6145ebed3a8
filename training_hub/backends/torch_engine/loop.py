"""The loop: what happens in one run, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from training_hub.backends.shared.due import is_evaluation_due, is_saving_due, measured
from training_hub.backends.shared.errors import Lost, interrupted, listed, not_finite
from training_hub.backends.shared.exam import Exam
from training_hub.backends.shared.packs import reported
from training_hub.backends.shared.signals import StopRequest
from training_hub.backends.torch_engine.answers import exam as asking
from training_hub.backends.torch_engine.by_source import BySource
from training_hub.backends.torch_engine.profile import DATA, OPTIMIZER
from training_hub.backends.torch_engine.run import Run
from training_hub.backends.torch_engine.saving.steps import save, settle
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.backends.torch_engine.waiting import DataWait
from training_hub.data.feed import validation_packs
from training_hub.data.packing import pack
from training_hub.data.store import TokenStore
from training_hub.errors import TrainingError
from training_hub.evaluation.metrics import perplexity
from training_hub.monitoring.throughput import ThroughputMeter, memory_gib
from training_hub.recipe.schedule import learning_rate
from training_hub.types import Batch, Pack, StepReport


def train(run: Run, stop: StopRequest) -> Iterator[StepReport]:
    """One report for each optimizer step from where the run stands to its end.

    A step is reported before it is saved, so that the metrics never miss a step that a checkpoint holds. Raises
    Interrupted, with the state saved, at the first step boundary after a signal. Ends early, after a step that is
    reported and not saved, where the watch has a reason to.
    """
    evaluation = run.recipe.evaluation
    meter, wait = ThroughputMeter(run.feed.total_steps, first_step=run.step), DataWait()
    if run.step == 0 and run.exam is not None:
        run.exam.clear()
    if run.step == 0 and run.validation is not None and evaluation.at_start:
        run.validation_before = evaluate(run, run.validation)
        before = run.validation_before
        run.console.say(f"validation before training: loss {before:.4f}, perplexity {perplexity(before):.2f}")
        if run.exam is not None:
            asking.begin(run.exam, run.model, run.console, run.layout)
    if run.watch is not None and run.watch.before is None:
        run.watch.begin(run.step, run.console)
    while run.step < run.feed.total_steps:
        with profiled(run):
            began = time.perf_counter()
            with record_function(DATA), wait.measured():
                batch = run.feed.batch(run.step + 1, run.layout.data_rank, run.layout.data_size)
            report = take_step(run, batch, meter, began)
        if slow := wait.line(report.step, report.step_seconds, run.feed.store):
            run.console.say(slow)
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
        number, must_save, must_end, has_failed = run.group.highest(
            [stop.number or 0, int(is_due), int(bool(run.stop_reason)), int(run.writer.has_failed)]
        )
        if has_failed:
            settle(run)
        if number or must_save:
            save(run)
            number = run.group.highest([stop.number or 0])[0]  # one may have come while it was saved
        if run.step < run.feed.total_steps:
            run.stop_reason = run.stop_reason or ("a callback of the first process ended it" if must_end else "")
            if reason := run.best.reason or run.stop_reason:
                run.console.say(f"stopped: {reason}")
                return
            if number:
                settle(run)
                raise interrupted(number, run.step, run.feed.total_steps, run.checkpoints.folder(run.step))


def profiled(run: Run) -> AbstractContextManager[Any]:
    """Where the next step is one to be taken apart, what does it."""
    return run.profile.step(run.step + 1) if run.profile is not None else nullcontext()


def take_step(run: Run, batch: Batch, meter: ThroughputMeter, began: float) -> StepReport:
    """Forward, backward and update on one batch; the loss is a sum divided once by the batch's trained weight.

    Of several processes each has packs of its own; losses and gradients are summed, so that all find the same numbers.

    began: when the step began, by time.perf_counter: before its batch was asked for, so that waiting counts.
    """
    run.group.note(f"step {batch.step}, its packs")
    mean = accumulate(run, batch)
    run.group.note(f"step {batch.step}, the sum of gradients")
    with record_function(OPTIMIZER):
        norm = run.updater.clip()
    # The only place in a step where the host waits for the device, but for what an adaptation measures at its end.
    wanted = torch.stack([mean, norm.to(torch.float64)])
    loss, grad_norm, *sums = (wanted if run.by_source is None else torch.cat([wanted, run.by_source.sums])).tolist()
    rate = learning_rate(run.recipe.lr_scheduler, run.recipe.optimizer.lr, batch.step, run.feed.total_steps)
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if is_finite:
        if run.staging is not None:
            run.staging.hold_device()
        with record_function(OPTIMIZER):
            run.adaptation.before_step(rate)
            run.updater.step(rate)
            run.adaptation.after_step()
    elif run.recipe.training.on_nonfinite == "stop" or nonfinite_tensors(run.updater.masters.weights):
        raise nonfinite(run, batch, loss, grad_norm)  # no later step would be finite, so there is none to skip to
    run.skipped_in_row = 0 if is_finite else run.skipped_in_row + 1
    if run.skipped_in_row >= run.recipe.training.max_skipped:
        raise nonfinite(run, batch, loss, grad_norm)
    run.updater.masters.drop_gradients()
    measures = plain_numbers(run.adaptation.metrics()) | (run.by_source.means(sums) if run.by_source else {})
    seconds = time.perf_counter() - began
    return reported(
        batch,
        meter,
        run.feed.total_steps,
        seconds,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        memory_gib=peak_memory_gib(run.device),
        skipped=not is_finite,
        peak_fraction=run.scale.fraction(batch.packs, seconds) if run.scale is not None else None,
        measures=measures,
    )


def plain_numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of a device as numbers, fetched at once."""
    if not scalars:
        return {}
    values = torch.stack([scalar.to(torch.float64) for scalar in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))


def accumulate(run: Run, batch: Batch) -> Tensor:
    """Add up the gradients of the batch's packs; its mean loss per trained token, as a float64 scalar."""
    torch.manual_seed(step_seed(run.recipe.seed, batch.step))
    if run.layout.place:
        torch.rand(run.layout.place, device=run.device)  # from here on dropout is not that of the other processes
    run.model.train()
    if run.thaw is not None:
        run.thaw.begin(batch.step, run.console)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    if run.by_source is not None:
        run.by_source.begin()
    masters = run.updater.masters

    def last() -> None:
        run.adaptation.expect_last_backward()
        run.updater.expect_last_backward()

    divisor = batch.trained_weight
    if run.recorder is not None:
        done = run.recorder.learn(batch.packs, divisor, last)
    else:
        done = run.layout.learn(
            run.model, run.objective, batch.packs, divisor, spare_pack(run), last=last, made=masters.collect
        )
    for one, tensors, term in done:
        total += term.total
        if run.by_source is not None:
            run.by_source.add(term, tensors, one)
    run.updater.end_backward()
    if run.by_source is not None:
        run.layout.sum(run.by_source.sums)
    return run.layout.sum(total) / divisor


def spare_pack(run: Run) -> Callable[[], Pack]:
    """What makes a pack for passes that add nothing, for the sake of processes that have a pack left."""
    store = run.feed.store
    return lambda: pack([store[store.shortest]], [store.shortest])


def step_seed(seed: int, step: int) -> int:
    """The seed of dropout in `step`: a function of both, so that a resumed run draws what an unbroken one would."""
    return (seed * 1_000_003 + step) % 2**63


@torch.no_grad()
def evaluate(run: Run, store: TokenStore, what: str = "validation", sets: BySource | None = None) -> float:
    """Mean cross-entropy over the trained tokens of all of `store`, in nats; `sets` gathers that of each set."""
    run.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    packs = validation_packs(store, run.feed.settings.token_budget, run.packs_validation)
    with run.updater.averaged(), run.console.progress(what, total=int(store.lengths.sum()), unit="tokens") as advance:
        for done, tokens in run.layout.ask(run.model, run.plain, packs, spare_pack(run)):
            for one, tensors, term in done:
                total += term.total
                if sets is not None:
                    sets.add(term, tensors, one)
            advance(tokens)
    return float(run.layout.sum(total)) / float(store.trained_weight.sum())


def validate(run: Run, store: TokenStore, report: StepReport) -> StepReport:
    """The report with what the validation rows say: their loss, of each of several sets too, and scores of answers
    where these are asked for."""
    sets, measures = run.validation_sets, report.measures
    if sets is not None:
        sets.begin()
    loss = evaluate(run, store, sets=sets)
    if sets is not None:
        measures = {**measures, **sets.means(run.layout.sum(sets.sums).tolist())}
    scores = take_exam(run, run.exam) if run.exam is not None else {}
    doubt = perplexity(loss)
    return replace(report, validation_loss=loss, validation_perplexity=doubt, scores=scores, measures=measures)


def take_exam(run: Run, exam: Exam) -> dict[str, float]:
    """The scores of the answers at this step."""
    with run.updater.averaged():
        return asking.take(exam, run.model, run.step, run.console, run.layout)


def dry_step(run: Run) -> None:
    """Forward and backward on the largest pack, so that memory runs out in minute one or not at all."""
    run.model.train()
    torch.manual_seed(step_seed(run.recipe.seed, 0))
    one = run.feed.largest_pack()
    last, divisor = run.adaptation.expect_last_backward, max(float(one.weights.sum()), 1.0)
    for _ in run.layout.learn(run.model, run.objective, [one] * under_way(run), divisor, spare_pack(run), last=last):
        pass
    run.updater.masters.drop_gradients()


def under_way(run: Run) -> int:
    """How many packs a step has under way at once: one, but in a pipeline."""
    if run.layout.pipeline is None:
        return 1
    packs = len(run.feed.batch(1, run.layout.data_rank, run.layout.data_size).packs)
    return max(1, min(packs, run.layout.pipeline.under_way or packs))


def nonfinite(run: Run, batch: Batch, loss: float, grad_norm: float) -> TrainingError:
    """The error about a step whose loss or gradient is not finite; names the rows that do it alone."""
    run.updater.masters.drop_gradients()
    settle(run)
    indices = [int(index) for one in batch.packs for index in one.samples]
    losses = [(index, _loss_alone(run, index)) for index in run.layout.passes(indices)]
    guilty = [index for index, loss in losses if index is not None and not math.isfinite(loss)]
    found = run.group.gather([[str(run.feed.store.origin(index)) for index in some] for some in (guilty, indices)])
    is_told = any(alone for alone, _ in found)
    who = "rows whose own loss is not finite" if is_told else "no row does it alone; rows of the step"
    shown = "; ".join(
        (f"on rank {rank} " if run.group.world_size > 1 else "") + listed(alone if is_told else rows)
        for rank, (alone, rows) in enumerate(found)
        if (alone if is_told else rows)
    )
    lost = Lost(batch.step, loss, grad_norm, f"{who.capitalize()}: {shown}")
    return not_finite(lost, run.recipe, run.skipped_in_row, run.checkpoints.steps())


@torch.no_grad()
def _loss_alone(run: Run, index: int | None) -> float:
    """The loss of a sample; of any, and of no account, where other processes have more to ask about."""
    index = run.feed.store.shortest if index is None else index
    one = pack([run.feed.store[index]], [index])
    return float(run.objective(run.model, run.layout.tensors(run.model, one)).total)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return memory_gib()
