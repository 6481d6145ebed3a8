"""One run of the jax engine, from a recipe to a trained model."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_hub.algorithms import find_algorithm
from training_hub.backends import Given, Watcher
from training_hub.backends.jax_engine import weights as files
from training_hub.backends.jax_engine.beforehand import numbers_of, starting_step
from training_hub.backends.jax_engine.build import (
    PREFERRED_TOKENS,
    Machine,
    Programs,
    keep_programs,
    machine_of,
    programs,
)
from training_hub.backends.jax_engine.by_source import BySource
from training_hub.backends.jax_engine.checkpoints import Checkpoints
from training_hub.backends.jax_engine.exam import exam_of
from training_hub.backends.jax_engine.export import Beside, finish, saved_format
from training_hub.backends.jax_engine.freezing import tables_of
from training_hub.backends.jax_engine.full import Adaptation, Full
from training_hub.backends.jax_engine.generate import Speech
from training_hub.backends.jax_engine.loop import Run, dry_step, evaluate, nonfinite, resume
from training_hub.backends.jax_engine.loop import train as train_steps
from training_hub.backends.jax_engine.lora import LowRank
from training_hub.backends.jax_engine.materials import Materials, load_materials
from training_hub.backends.jax_engine.mesh import mesh_of
from training_hub.backends.jax_engine.optim import Updater
from training_hub.backends.jax_engine.osft import Spaces
from training_hub.backends.jax_engine.plan import describe, summary
from training_hub.backends.jax_engine.processes import ALONE, Group, digest, joined, refuse_differences
from training_hub.backends.jax_engine.proofs import Subject, prove
from training_hub.backends.jax_engine.spaces import Projection
from training_hub.backends.shared.materials import limits_of
from training_hub.backends.shared.outcome import early_end, final_metrics, told, versions
from training_hub.backends.shared.packs import settings_of
from training_hub.backends.shared.proofs import refuse
from training_hub.backends.shared.signals import StopRequest
from training_hub.backends.shared.watch import Watch
from training_hub.data.agreement import agreement
from training_hub.data.feed import Feed, packs_validation
from training_hub.errors import TrainingError
from training_hub.evaluation.best import Best
from training_hub.folders import write_json
from training_hub.monitoring.console import open_console
from training_hub.monitoring.jsonl import read_metrics
from training_hub.monitoring.proof_table import as_json, table
from training_hub.monitoring.throughput import speed_line
from training_hub.monitoring.watchers import asked_to_stop, open_watchers
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console, Proof, TrainResult

ROWS_COMPARED = {True: 256, False: 32}
"""Rows whose trained text is compared with what they say, in a check and at the start of a run."""


@dataclass(frozen=True)
class Session:
    """What a run holds beside the run itself."""

    run: Run
    machine: Machine
    materials: Materials
    made: Programs
    beside: Beside
    folder: RunFolder
    given: Given


def train(recipe: Recipe, given: Given) -> TrainResult:
    """Run the recipe to its end, going on from the newest whole checkpoint of its output folder.

    Where the environment says that this is one process of several (RANK, WORLD_SIZE), with the others.
    """
    with joined(recipe.comm) as group, group.kept("weights or gradients of the others"):
        return _train(recipe, given, group)


def _train(recipe: Recipe, given: Given, group: Group) -> TrainResult:
    console = open_console(recipe.monitoring.console if group.is_main else "off")
    folder = RunFolder(Path(recipe.output))
    began = time.perf_counter()
    rejects = folder.rejects if group.is_main else None
    materials = group.main_first("reading data", lambda: load_materials(recipe, given, console, rejects))
    refuse_differences(group, numbers_of(materials))
    keep_programs(recipe)
    machine = machine_of(recipe)
    feed = feed_of(recipe, materials, machine)
    adaptation = adaptation_of(recipe, materials, machine, console)
    step = group.on_main(
        "looking for checkpoints", lambda: starting_step(recipe, materials, adaptation.shapes(), feed, console)
    )
    console.say(f"model: loading {recipe.model.path} as {machine.dtype} on {machine.platform}")
    session = assemble(recipe, given, materials, machine, feed, adaptation, console, folder, group)
    run = session.run
    if step is not None:
        resume(run, step)
        console.say(f"resume: going on after step {step} of {feed.total_steps}")
    plan = plan_of(session)
    if group.is_main:
        write_json(folder.plan, plan)
    console.say(summary(plan))
    model_path = _run(session)
    group.gather("the end of the steps", "done")  # the last line of the metrics has been written
    history = tuple(read_metrics(folder.metrics)) if folder.metrics.exists() else ()
    reason = (run.watch.reason if run.watch is not None else "") or early_end(run)
    return TrainResult(
        status="stopped" if reason else "finished",
        output_dir=folder.path,
        model_path=model_path,
        checkpoints=tuple(run.checkpoints.folder(step) for step in run.checkpoints.steps()),
        metrics=final_metrics(run, history),
        history=history,
        plan=plan,
        engine=run.engine,
        versions=versions(run.engine),
        seconds=time.perf_counter() - began,
        reason=reason,
        **told(run, folder),
    )


def check(recipe: Recipe, given: Given) -> list[Proof]:
    """Load all that a run would, and try every proof; the output folder must exist and only gets the proofs."""
    console, folder = open_console(recipe.monitoring.console), RunFolder(Path(recipe.output))
    materials = load_materials(recipe, given, console)
    keep_programs(recipe)
    machine = machine_of(recipe)
    feed, adaptation = feed_of(recipe, materials, machine), adaptation_of(recipe, materials, machine, console)
    console.say(f"model: loading {recipe.model.path} as {machine.dtype} on {machine.platform}")
    session = assemble(recipe, given, materials, machine, feed, adaptation, console, folder)
    dry_step(session.run)
    return preflight(session, thorough=True)


def feed_of(recipe: Recipe, materials: Materials, machine: Machine) -> Feed:
    """The steps of the run."""
    store, preferred = materials.prepared.train, PREFERRED_TOKENS[machine.platform]
    return Feed(store, settings_of(recipe, int(store.lengths.max()), preferred, recipe.data.packing))


def adaptation_of(recipe: Recipe, materials: Materials, machine: Machine, console: Console) -> Adaptation:
    """What may move, by the table of algorithms."""
    name = find_algorithm(recipe.algorithm).adaptation
    if name == "lora":
        return LowRank(recipe, materials.shape, machine.dtype)
    if name == "osft":
        return Spaces(recipe, materials.shape, materials.source, console)
    return Full(materials.shape, materials.source, recipe.freezing, machine.dtype)


def assemble(
    recipe: Recipe,
    given: Given,
    materials: Materials,
    machine: Machine,
    feed: Feed,
    adaptation: Adaptation,
    console: Console,
    folder: RunFolder,
    group: Group = ALONE,
) -> Session:
    """The run at step 0."""
    mesh = mesh_of(recipe.parallelism, materials.shape)
    loaded = files.load(materials.source, materials.shape, console)
    if broken := nonfinite(loaded.weights):
        raise TrainingError([*broken, f"{recipe.model.path} came with them. Download or convert it again."])
    for line in loaded.notes:
        console.say(f"model: {line}")
    halves = adaptation.split(loaded.weights)
    if group.world_size > 1:
        new = {name: array for half in halves for name, array in half.items() if name not in loaded.weights}
        refuse_differences(group, {"computes in": machine.dtype, "new weights": digest(new), **versions("jax")})
    trained, frozen = (mesh.place(half) for half in halves)
    made = programs(recipe, materials, machine, mesh, feed, adaptation, (trained, frozen), console, group)
    refuse_differences(group, {"attention": made.attention.name})
    around = Projection(adaptation.protects, *adaptation.decay) if isinstance(adaptation, Spaces) else None
    tables = tables_of(materials.shape)
    updater = Updater(recipe.optimizer, recipe.training.max_norm, adaptation.undecayed, mesh.pin, around, tables)
    run = Run(
        recipe=recipe,
        steps=made.steps,
        adaptation=adaptation,
        trained=trained,
        frozen=frozen,
        updater=updater,
        state=updater.begin(trained),
        feed=feed,
        sizes=made.sizes,
        mesh=mesh,
        validation=materials.prepared.validation,
        checkpoints=Checkpoints(Path(recipe.output) / "checkpoints", recipe.checkpoint.keep_last),
        console=console,
        facts={**numbers_of(materials), "versions": versions("jax")},
        best=Best(recipe.evaluation),
        packs_validation=packs_validation(recipe.data),
        turns=adaptation.turns,
        exam=exam_of(recipe, materials),
        speech=Speech(made.steps.forward, limits_of(materials.config), made.steps.merge, mesh.lay),
        group=group,
    )
    sources = [one["name"] for one in materials.prepared.report["sources"]]
    if len(sources) > 1 and recipe.loss.by_source:
        run.by_source = BySource(sources, feed.store, parts=mesh.parts)
    sets = [one["name"] for one in materials.prepared.report.get("validation", {}).get("sources", ())]
    if run.validation is not None and len(sets) > 1:
        run.validation_sets = BySource(sets, run.validation, "validation_loss", mesh.parts)
    if materials.watch is not None:
        run.watch = Watch(materials.watch, recipe.evaluation, lambda store, what: evaluate(run, store, what))
    template = materials.template.source if materials.template else None
    beside = Beside(loaded.formats, materials.tokenizer.hf, template, materials.stop_ids)
    return Session(run, machine, materials, made, beside, folder, given)


def plan_of(session: Session) -> dict[str, Any]:
    """The plan of the run, as plain JSON."""
    run, save_dtype = session.run, saved_format(session.run, session.beside)
    held = {**run.frozen, **run.trained}
    return describe(
        run.recipe, session.materials, run.feed, session.machine, run.adaptation, run.mesh, session.made, held,
        save_dtype, run.group.world_size,
    )  # fmt: skip


def _run(session: Session) -> Path | None:
    """From the dry step to the final model, whose folder it gives, None where none is written."""
    run, recipe, folder, console = session.run, session.run.recipe, session.folder, session.run.console
    audience: AbstractContextManager[list[Watcher]] = nullcontext([])
    if run.group.is_main:
        callbacks = session.given.watchers
        audience = open_watchers(recipe, folder.path, console, resume_step=run.step, callbacks=callbacks)
    with StopRequest() as stop, audience as watchers:
        dry_step(run)
        if recipe.training.preflight and run.step == 0:
            begin_safely(session)
        for report in train_steps(run, stop):
            for watch in watchers:
                watch(report)
            run.stop_reason = asked_to_stop(watchers)
        if run.group.is_main and (metrics := final_metrics(run, tuple(read_metrics(folder.metrics)))):
            console.say(speed_line(metrics))
        path = finish(run, session.beside, folder) if recipe.checkpoint.final else None
        return Path(path) if path else None


def begin_safely(session: Session) -> None:
    """Try every proof and say what came of it. Raises TrainingError for one that failed."""
    proofs = preflight(session)
    for line in table(proofs):
        session.run.console.say(f"preflight: {line}")
    refuse(proofs)


def preflight(session: Session, thorough: bool = False) -> list[Proof]:
    """Every proof, tried after the dry step; written into the folder."""
    began = time.perf_counter()
    run, materials = session.run, session.materials
    tokenizer, rows, count = materials.tokenizer, session.given.rows, ROWS_COMPARED[thorough]
    subject = Subject(
        run=run,
        dtype=session.machine.dtype,
        attention=session.made.attention.proof,
        agreement=lambda: agreement(
            run.recipe.data, run.feed.store, tokenizer, count, rows, run.recipe.training.max_seq_len
        ),
        beside=session.beside,
        ending_ids=tuple(tokenizer.special_ids.values()),
        source=materials.source,
        scratch=session.folder.path,
    )
    proofs = prove(subject)
    if session.run.group.is_main:
        write_json(session.folder.preflight, as_json(proofs, time.perf_counter() - began))
    return proofs
