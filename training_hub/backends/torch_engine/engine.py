"""The torch engine: from a recipe to a trained model, in one process or as one of several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training_hub.backends import Given, OwnMetrics, Watcher
from training_hub.backends.shared.model_folder import hub_problem
from training_hub.backends.shared.outcome import early_end, final_metrics, told, versions
from training_hub.backends.shared.proofs import refuse
from training_hub.backends.shared.signals import StopRequest
from training_hub.backends.shared.voice import Voice
from training_hub.backends.torch_engine.adaptations import adaptation_problems
from training_hub.backends.torch_engine.answers.scoring import examine, examine_together, score
from training_hub.backends.torch_engine.answers.voice import open_voice
from training_hub.backends.torch_engine.assembly import assemble, forget_activations, recorder_of
from training_hub.backends.torch_engine.checkpointing import free_gib, way_problem
from training_hub.backends.torch_engine.compiling import LIVE, budgeted
from training_hub.backends.torch_engine.fused import eight_bit
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.layouts.beforehand import process_problems
from training_hub.backends.torch_engine.loading.dividing import load_for
from training_hub.backends.torch_engine.loading.model import (
    LoadedModel,
    choose_device,
    choose_dtype,
    folder_problems,
    load_model,
)
from training_hub.backends.torch_engine.loading.rounding import round_no_more
from training_hub.backends.torch_engine.loop import dry_step, plain_numbers, train
from training_hub.backends.torch_engine.materials import Materials, first_lengths, load_materials, stop_ids
from training_hub.backends.torch_engine.merging import merge_for
from training_hub.backends.torch_engine.optimizers.library import problems
from training_hub.backends.torch_engine.outcome import speed_lines
from training_hub.backends.torch_engine.parallel import Group, joined
from training_hub.backends.torch_engine.planning.beforehand import Outline, outline, starting_step
from training_hub.backends.torch_engine.planning.plan import (
    describe,
    load_beside,
    memory_of,
    plan,
    summary,
)
from training_hub.backends.torch_engine.planning.work import Scale, measured_peak, no_operations, work_of
from training_hub.backends.torch_engine.processor import prepare_processor
from training_hub.backends.torch_engine.profile import FILE_NAME, StepProfile
from training_hub.backends.torch_engine.proofs import Subject, agreed, prove
from training_hub.backends.torch_engine.recording import recording_problem
from training_hub.backends.torch_engine.run import Run
from training_hub.backends.torch_engine.saving.final import finish, saved_dtype, write_model
from training_hub.backends.torch_engine.saving.steps import resume, settle, settled
from training_hub.backends.torch_engine.teacher.facts import chosen_teacher, teacher_problems
from training_hub.backends.torch_engine.teacher.teaching import open_teaching
from training_hub.backends.torch_engine.together import refuse_other_data, same_start
from training_hub.data.agreement import agreement
from training_hub.errors import RecipeError, TrainingError
from training_hub.evaluation.judging import objections as metric_objections
from training_hub.evaluation.predictions import Sitting
from training_hub.folders import write_json
from training_hub.monitoring.console import open_console
from training_hub.monitoring.jsonl import read_metrics
from training_hub.monitoring.proof_table import as_json, table
from training_hub.monitoring.watchers import asked_to_stop, open_watchers
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console, Proof, TrainResult

# Rows whose trained text is compared with what they say, in a check and at the start of a run.
ROWS_COMPARED = {True: 256, False: 32}


class TorchEngine:
    """Trains with torch on a CPU or a GPU, in this process alone or with others that were started with it."""

    name = "torch"

    def num_devices(self) -> int:
        """GPUs of this node, which take a process each; 1 where there is none."""
        return max(1, torch.cuda.device_count())

    def objections(self, recipe: Recipe) -> list[str]:
        """Why this recipe cannot run here; cheap checks that load no weights."""
        asked, teacher = recipe.evaluation, chosen_teacher(recipe)
        return [
            *process_problems(recipe),
            *self._number_problems(recipe),
            *problems(recipe.optimizer),
            *self._model_problems(recipe),
            *adaptation_problems(recipe),
            *(metric_objections(asked.metrics) if asked.generate else []),
            *(teacher_problems(teacher) if teacher is not None else []),
        ]

    def plan(self, recipe: Recipe, console: Console, *, measures: bool) -> dict[str, Any]:
        """The plan of a run of this recipe here, as its plan.json says it, without loading weights.

        measures: also time a matrix product, and say as `time` how long the run takes at least.
        """
        problems = [*process_problems(recipe), *adaptation_problems(recipe)]
        if problems:
            raise RecipeError(problems)
        return plan(recipe, console, measures=measures)

    def _model_problems(self, recipe: Recipe) -> list[str]:
        chosen = recipe.model
        if chosen.path.startswith("("):  # not a path: it stands for a model that is handed over
            return [LIVE] if recipe.training.compile else []
        found = folder_problems(chosen.path, trust_remote_code=chosen.trust_remote_code)
        if found or Path(chosen.path).expanduser().exists():
            return found
        problem = hub_problem(chosen.path, chosen.revision)
        return [problem] if problem else []

    def _number_problems(self, recipe: Recipe) -> list[str]:
        device, how = choose_device(), recipe.training.activation_checkpointing
        problems = [
            eight_bit.problem_on(device) if recipe.training.fp8 else None,
            recording_problem(recipe, device),
            way_problem(how, device),
        ]
        return [problem for problem in problems if problem]

    def train(self, recipe: Recipe, given: Given) -> TrainResult:
        """Run the recipe to its end, going on from the newest whole checkpoint of its output folder.

        Where the environment says that this is one process of several (RANK, WORLD_SIZE), with the others.
        """
        with joined(recipe.comm) as group, group.kept("weights or gradients of the others"):
            return self._train(recipe, given, group)

    def _train(self, recipe: Recipe, given: Given, group: Group) -> TrainResult:
        console = open_console(recipe.monitoring.console if group.is_main else "off")
        folder = RunFolder(Path(recipe.output))
        began = time.perf_counter()
        rejects = folder.rejects if group.is_main else None
        materials = group.main_first("reading data", lambda: load_materials(recipe, given, console, rejects))
        refuse_other_data(group, materials)
        device = choose_device()
        prepare_processor(device)
        layout = layout_of(recipe.parallelism, group, device)
        dtype = choose_dtype(recipe.model.dtype, device)
        step = None
        known = partial(outline, recipe, materials, device, dtype)
        if given.model is None:
            step = group.on_main("looking for checkpoints", lambda: starting_step(known(), console))
        store = materials.prepared.train
        ask = partial(open_teaching, recipe, materials.teacher, store, device, console, layout=layout)
        teaching = ask() if layout.is_sharded else group.main_first("the teacher", ask)
        console.say(f"model: loading {recipe.model.path} as {str(dtype).removeprefix('torch.')} on {device.type}")
        loaded = load_for(layout, recipe, device, dtype, given.model, first_lengths(materials), console)
        run = assemble(recipe, loaded, materials, device, dtype, console, teaching, layout)
        plain = known() if layout.is_divided else None  # shapes are told by a model that is not
        shapes = run.model if plain is None else plain.model
        holdings = run.adaptation.holdings() if plain is None else plain.holdings
        if given.model is not None:  # there were no weights to read, so nothing is asked too late
            live = Outline(recipe, materials, run.model, device, dtype, loaded.original_dtype, run.facts, holdings)
            step = group.on_main("looking for checkpoints", lambda: starting_step(live, console))
        planned = describe(
            recipe, materials, shapes, run.feed, device, dtype, loaded.original_dtype, holdings, group.world_size
        )
        forget_activations(run, planned["activation_checkpointing"])
        if group.is_main:
            write_json(folder.plan, planned)
        console.say(summary(planned))
        if step is None:
            same_start(run)
        else:
            resume(run, step)
            console.say(f"resume: going on after step {step} of {run.feed.total_steps}")
        beside = load_beside(recipe, materials, run.feed, device)
        asked = beside.operations if beside is not None else no_operations
        run.scale = Scale(work_of(shapes), measured_peak(device, dtype) * layout.degrees.sharers, asked)
        if recipe.monitoring.profile and group.is_main:
            packs, ahead = planned["run"]["packs_per_step"], run.feed.total_steps - run.step
            run.profile = StepProfile(run.step + 1, ahead, packs, device, folder.path / FILE_NAME)
        model_path = self._run(run, loaded, materials, given, planned["memory_gib"], folder)
        return self._result(run, folder, planned, model_path, time.perf_counter() - began)

    def _run(
        self,
        run: Run,
        loaded: LoadedModel,
        materials: Materials,
        given: Given,
        memory: dict[str, Any],
        folder: RunFolder,
    ) -> Path | None:
        """From the dry step to the final model, whose folder it gives, None where none is written."""
        recipe, group, console = run.recipe, run.group, run.console
        audience: AbstractContextManager[list[Watcher]] = nullcontext([])
        if group.is_main:
            audience = open_watchers(recipe, folder.path, console, resume_step=run.step, callbacks=given.watchers)
        with (
            memory_errors_explained(run),
            budgeted(recipe.training),
            closing_masters(run),
            StopRequest() as stop,
            audience as watchers,
            settled(run),
        ):
            dry_step(run)
            if recipe.training.preflight and run.step == 0:
                run.layout.together("preflight", lambda: begin_safely(run, loaded, materials, given, memory, folder))
            run.recorder = recorder_of(run)
            for report in train(run, stop):
                for watch in watchers:
                    watch(report)
                run.stop_reason = asked_to_stop(watchers)
            settle(run)
            if group.is_main:
                for line in speed_lines(run, folder):
                    console.say(line)
            if not recipe.checkpoint.final:
                return None
            # Within reach of the stop request: a first signal lets the final model be finished.
            path = finish(run, loaded, materials, folder, console)
            return Path(path) if path else None

    def check(self, recipe: Recipe, given: Given) -> list[Proof]:
        """Load all that a run would, and try every proof; the output folder must exist and only gets the proofs."""
        console = open_console(recipe.monitoring.console)
        materials = load_materials(recipe, given, console)
        device = choose_device()
        prepare_processor(device)
        dtype = choose_dtype(recipe.model.dtype, device)
        teaching = open_teaching(recipe, materials.teacher, materials.prepared.train, device, console, keeps=False)
        loaded = load_model(recipe, device, dtype, given.model, first_lengths(materials))
        run = assemble(recipe, loaded, materials, device, dtype, console, teaching)
        holdings, free = run.adaptation.holdings(), free_gib(device)
        beside = load_beside(recipe, materials, run.feed, device)
        how, memory = memory_of(recipe, run.model, run.feed, device, dtype, holdings, free, beside)
        forget_activations(run, how)
        with memory_errors_explained(run):
            dry_step(run)
            return preflight(run, loaded, materials, given, memory, RunFolder(Path(recipe.output)), thorough=True)

    def score(self, recipe: Recipe, console: Console, *, generates: bool) -> dict[str, float]:
        """How well the model of model.path does the rows of data.path."""
        return score(recipe, console, generates=generates)

    def examine(self, recipe: Recipe, given: Given, console: Console, own: OwnMetrics = ()) -> Sitting:
        """What the model of model.path says to the rows, and its scores."""
        return examine(recipe, given, console, own)

    def examine_together(
        self, recipes: Sequence[Recipe], given: Given, console: Console, own: OwnMetrics = ()
    ) -> list[Sitting]:
        """The same of several models, by all processes that were started with this one, in each of them."""
        return examine_together(recipes, given, console, own)

    def merge(self, recipe: Recipe, given: Given, adapter: Path, console: Console) -> dict[str, Any]:
        """The adapter in its base as one model in recipe.output, compared on the rows of data.path."""
        return merge_for(recipe, given, adapter, console)

    def voice(self, recipe: Recipe) -> Voice:
        """The model of model.path, to be talked to."""
        return open_voice(recipe)

    def _result(
        self, run: Run, folder: RunFolder, plan: dict[str, Any], model_path: Path | None, seconds: float
    ) -> TrainResult:
        run.group.gather("steps")  # the last line has been written
        history = tuple(read_metrics(folder.metrics)) if folder.metrics.exists() else ()
        reason = (run.watch.reason if run.watch is not None else "") or early_end(run)
        return TrainResult(
            status="stopped" if reason else "finished",
            output_dir=folder.path,
            model_path=model_path,
            checkpoints=tuple(run.checkpoints.folder(step) for step in run.checkpoints.steps()),
            metrics={**final_metrics(run, history), **plain_numbers(run.adaptation.metrics())},
            history=history,
            plan=plan,
            engine=self.name,
            versions=versions(self.name),
            seconds=seconds,
            reason=reason,
            **told(run, folder),
        )


@contextmanager
def closing_masters(run: Run) -> Iterator[None]:
    """However the run ends, give a live model back to whoever handed it over as one that others can train."""
    try:
        yield
    finally:
        run.updater.release()
        round_no_more(run.model)


@contextmanager
def memory_errors_explained(run: Run) -> Iterator[None]:
    """Turn the device's "out of memory" into a TrainingError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        is_cpu = "can't allocate memory" in str(error)  # torch's CPU allocator has no type of its own for this
        if not (is_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        longest, budget = int(run.feed.store.lengths.max()), run.feed.settings.token_budget
        remedy = f"training.max_tokens_per_gpu: {max(longest, budget // 2)}" if budget > longest else "shorter samples"
        raise TrainingError(
            f"out of memory on {run.device.type} at step {run.step + 1} with packs of {budget:,} tokens: "
            f"{str(error).splitlines()[0]} Write {remedy}, which does not change the result."
        ) from error


def preflight(
    run: Run,
    loaded: LoadedModel,
    materials: Materials,
    given: Given,
    memory: dict[str, Any],
    folder: RunFolder,
    thorough: bool = False,
) -> list[Proof]:
    """Every proof, tried after the dry step; written into the folder. `memory`: what the plan says it takes."""
    began = time.perf_counter()
    subject = Subject(
        run=run,
        dtype=choose_dtype(run.recipe.model.dtype, run.device),  # slices are kept in another than is computed in
        save_dtype=saved_dtype(run, loaded),
        agreement=lambda: agreement(
            run.recipe.data,
            run.feed.store,
            materials.tokenizer,
            ROWS_COMPARED[thorough],
            given.rows,
            run.recipe.training.max_seq_len,
        ),
        stop_ids=stop_ids(materials),
        ending_ids=tuple(materials.tokenizer.special_ids.values()),
        save=lambda place: write_model(run, loaded, materials, place),
        scratch=folder.path,
        predicted=memory,
        thorough=thorough,
    )
    proofs = agreed(run, prove(subject))
    seconds = time.perf_counter() - began
    if run.group.is_main:
        write_json(folder.preflight, as_json(proofs, seconds))
    return proofs


def begin_safely(
    run: Run, loaded: LoadedModel, materials: Materials, given: Given, memory: dict[str, Any], folder: RunFolder
) -> None:
    """Try every proof and say what came of it. Raises TrainingError for one that failed."""
    proofs = preflight(run, loaded, materials, given, memory, folder)
    for line in table(proofs):
        run.console.say(f"preflight: {line}")
    refuse(proofs)
