"""The torch engine: from a recipe to a trained model in one process."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training_hub.algorithms import find_algorithm
from training_hub.backends import Given
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.checkpoints import Checkpoints
from training_hub.backends.torch_engine.export import export
from training_hub.backends.torch_engine.loop import Run, dry_step, resume, train
from training_hub.backends.torch_engine.model import (
    Limits,
    LoadedModel,
    choose_device,
    choose_dtype,
    folder_problems,
    limits_of,
    load_model,
    read_limits,
)
from training_hub.backends.torch_engine.objectives import OBJECTIVES
from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.preflight import packed_equals_alone
from training_hub.backends.torch_engine.signals import StopRequest
from training_hub.data.feed import Feed, FeedSettings
from training_hub.data.prepare import Prepared, prepare
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate, resolve_template
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError, TrainingError
from training_hub.evaluation.metrics import perplexity
from training_hub.folders import write_json
from training_hub.monitoring.console import open_console
from training_hub.monitoring.jsonl import read_metrics
from training_hub.monitoring.watchers import open_watchers
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console, TrainResult

# Tokens per pack that keep the matrix units busy; more only costs memory. The recipe's max_tokens_per_gpu is a bound.
PREFERRED_TOKENS = {"cpu": 8192, "cuda": 32768}
# Relative difference of packed and separate losses that rounding explains, by format.
PACKING_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
SAMPLES_FOR_STOP = 1000
VERSIONS_OF = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "training-hub")


@dataclasses.dataclass(frozen=True)
class Materials:
    """What a run is made from, before any weight is loaded."""

    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    prepared: Prepared


class TorchEngine:
    """Trains with torch in this process, on one CPU or one GPU."""

    name = "torch"

    def objections(self, recipe: Recipe) -> list[str]:
        """Why this recipe cannot run here; cheap checks that load no weights."""
        found = []
        processes = recipe.processes
        if processes.procs not in (1, "auto", "gpu") or processes.nodes > 1:
            found.append(
                f"processes: {processes.procs} processes on {processes.nodes} nodes; the torch engine runs one process "
                "so far. Write processes.procs: 1 (nproc_per_node=1) and processes.nodes: 1 (nnodes=1)."
            )
        if processes.procs in ("auto", "gpu") and torch.cuda.device_count() > 1:
            found.append(
                f"processes.procs: {processes.procs!r} would start {torch.cuda.device_count()} processes; the torch "
                "engine runs one so far. Write processes.procs: 1."
            )
        if Path(recipe.model.path).expanduser().exists():
            found += folder_problems(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        return found

    def train(self, recipe: Recipe, given: Given) -> TrainResult:
        """Run the recipe to its end, going on from the newest whole checkpoint of its output folder."""
        console = open_console(recipe.monitoring.console)
        folder = RunFolder(Path(recipe.output))
        began = time.perf_counter()
        materials = load_materials(recipe, given, console)
        device = choose_device()
        dtype = choose_dtype(recipe.model.dtype, device)
        console.say(f"model: loading {recipe.model.path} as {str(dtype).removeprefix('torch.')} on {device.type}")
        loaded = load_model(recipe, device, dtype, model=given.model)
        run = assemble(recipe, loaded, materials, device, dtype, console)
        plan = describe(run, loaded, materials, dtype)
        write_json(folder.plan, plan)
        console.say(summary(plan))
        go_on(run, console)
        with (
            memory_errors_explained(run),
            StopRequest() as stop,
            open_watchers(recipe, folder.path, console, resume_step=run.step, callbacks=given.watchers) as watchers,
        ):
            dry_step(run)
            for report in train(run, stop):
                for watch in watchers:
                    watch(report)
        model_path = finish(run, loaded, materials, folder, console) if recipe.checkpoint.final else None
        return self._result(run, folder, plan, model_path, time.perf_counter() - began)

    def _result(
        self, run: Run, folder: RunFolder, plan: dict[str, Any], model_path: Path | None, seconds: float
    ) -> TrainResult:
        history = tuple(read_metrics(folder.metrics))
        return TrainResult(
            status="finished",
            output_dir=folder.path,
            model_path=model_path,
            checkpoints=tuple(run.checkpoints.folder(step) for step in run.checkpoints.steps()),
            metrics=final_metrics(run, history),
            history=history,
            plan=plan,
            engine=self.name,
            versions=versions(),
            seconds=seconds,
        )


def load_materials(recipe: Recipe, given: Given, console: Console) -> Materials:
    """Tokenizer, template and token stores. Every problem of the data is raised here, before weights are loaded."""
    if given.tokenizer is not None:
        tokenizer = ChatTokenizer.wrap(given.tokenizer)
    else:
        path = recipe.model.tokenizer or recipe.model.path
        tokenizer = ChatTokenizer.load(
            path, trust_remote_code=recipe.model.trust_remote_code, revision=recipe.model.revision
        )
    template = resolve_template(recipe.data.chat_template, tokenizer)
    prepared = prepare(
        recipe,
        tokenizer=tokenizer,
        template=template,
        console=console,
        rows=given.rows,
        validation_rows=given.validation_rows,
    )
    limits = read_limits(recipe.model) if given.model is None else limits_of(given.model.config)
    stores = [prepared.train, *([prepared.validation] if prepared.validation is not None else [])]
    for store in stores:
        check_limits(store, limits, console)
    return Materials(tokenizer, template, prepared)


def check_limits(store: TokenStore, limits: Limits, console: Console) -> None:
    """Raise DataError for token ids or lengths that the model has no weights for; say what it was not trained for."""
    problems = []
    largest = store.largest_id()
    if largest >= limits.vocabulary:
        problems.append(
            f"data: token id {largest} occurs, but the model has embeddings for {limits.vocabulary} tokens, 0 to "
            f"{limits.vocabulary - 1}. Use the tokenizer that belongs to the model, or add the tokens to it first."
        )
    longest = int(store.lengths.argmax())
    length = int(store.lengths[longest])
    if limits.positions is not None and length > limits.positions:
        line = f"{store.origin(longest)}: {length:,} tokens, but the model has {limits.positions:,} positions"
        remedy = f"training.max_seq_len: {limits.positions}"
        if limits.is_hard:
            problems.append(f"{line}. Write {remedy}.")
        else:
            console.say(f"data: {line}; it was not trained for more. {remedy} keeps within it")
    if problems:
        raise DataError(problems)


def assemble(
    recipe: Recipe,
    loaded: LoadedModel,
    materials: Materials,
    device: torch.device,
    dtype: torch.dtype,
    console: Console,
) -> Run:
    """The run at step 0."""
    algorithm = find_algorithm(recipe.algorithm)
    adaptation = ADAPTATIONS[algorithm.adaptation](recipe)
    model = adaptation.attach(loaded.model)
    objective, note = OBJECTIVES[algorithm.objective](model)
    for line in (*loaded.notes, *([note] if note else [])):
        console.say(f"model: {line}")
    is_packed = recipe.data.packing and can_pack(model, objective, dtype, console)
    store = materials.prepared.train
    return Run(
        recipe=recipe,
        model=model,
        objective=objective,
        adaptation=adaptation,
        updater=Updater(Masters(model.named_parameters()), recipe.optimizer, recipe.training.max_norm),
        feed=Feed(store, feed_settings(recipe, int(store.lengths.max()), device, is_packed)),
        validation=materials.prepared.validation,
        checkpoints=Checkpoints(Path(recipe.output) / "checkpoints", recipe.checkpoint.keep_last),
        device=device,
        console=console,
        facts={
            "data_fingerprint": store.fingerprint,
            "tokenizer_fingerprint": materials.tokenizer.fingerprint,
            "versions": versions(),
        },
    )


def feed_settings(recipe: Recipe, longest: int, device: torch.device, is_packed: bool) -> FeedSettings:
    """How the recipe's rows become batches on this device."""
    preferred = PREFERRED_TOKENS[device.type]
    bound = recipe.training.max_tokens_per_gpu or max(preferred, recipe.training.max_seq_len)
    return FeedSettings(
        samples_per_step=recipe.training.global_batch_size,
        token_budget=max(longest, min(bound, preferred)),
        seed=recipe.seed,
        epochs=recipe.training.epochs,
        steps=recipe.training.steps,
        is_shuffled=recipe.data.shuffle,
        is_packed=is_packed,
    )


def can_pack(model: Any, objective: Any, dtype: torch.dtype, console: Console) -> bool:
    """Whether this model keeps packed samples apart; says so where it does not."""
    difference = packed_equals_alone(model, objective, model.config.get_text_config().vocab_size)
    if difference <= PACKING_TOLERANCE[dtype]:
        return True
    console.say(
        f"model: packed samples would see each other (losses differ by {difference:.1e}), so each sample runs alone"
    )
    return False


def go_on(run: Run, console: Console) -> None:
    """Move the run to the newest whole checkpoint of its folder, if there is one."""
    step = run.checkpoints.newest_valid(console.say)
    if step is None:
        return
    resume(run, step)
    console.say(f"resume: going on after step {step} of {run.feed.total_steps}")


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


def finish(run: Run, loaded: LoadedModel, materials: Materials, folder: RunFolder, console: Console) -> Path:
    """Write the final model, the best one where the recipe keeps it."""
    if run.recipe.checkpoint.keep_best and run.best is not None and run.best[1] != run.step:
        console.say(f"final: taking step {run.best[1]}, with the lowest validation loss {run.best[0]:.4f}")
        run.updater.masters.load(run.checkpoints.load(run.best[1]).weights)
    wanted = run.recipe.model.save_dtype
    dtype = loaded.original_dtype if wanted == "auto" else getattr(torch, wanted)
    difference = export(
        run.model,
        run.adaptation.export(run.updater.masters.weights, dtype),
        dtype,
        folder.final,
        materials.tokenizer.hf,
        materials.template.source if materials.template else None,
        stop_ids(materials),
        trust_remote_code=run.recipe.model.trust_remote_code,
    )
    console.say(
        f"final: {folder.final} ({str(dtype).removeprefix('torch.')}), loaded again and equal; logits differ from "
        f"training by at most {difference:.1e}"
    )
    return folder.final


def stop_ids(materials: Materials) -> list[int]:
    """The ids at which the model stops: those it was known by, and the special token that ends most trained samples.

    A base model taught with <|im_end|> has learned to end there, whatever its own end-of-sequence token is.
    """
    store = materials.prepared.train
    ends: Counter[int] = Counter()
    for index in range(min(len(store), SAMPLES_FOR_STOP)):
        sample = store[index]
        ends[int(sample.ids[int(sample.weights.nonzero()[0][-1])])] += 1
    last, count = ends.most_common(1)[0]
    special = set(materials.tokenizer.special_ids.values())
    learned = {last} if last in special and 2 * count > ends.total() else set()
    return sorted(materials.tokenizer.stop_ids | learned)


def describe(run: Run, loaded: LoadedModel, materials: Materials, dtype: torch.dtype) -> dict[str, Any]:
    """The plan: what was decided before the first step, as plain JSON."""
    store, feed = materials.prepared.train, run.feed
    parameters = sum(p.numel() for p in run.model.parameters())
    return {
        "algorithm": run.recipe.algorithm,
        "engine": "torch",
        "device": run.device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "save_dtype": str(loaded.original_dtype).removeprefix("torch."),
        "parameters": parameters,
        "trained_parameters": sum(w.numel() for w in run.updater.masters.weights.values()),
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained_tokens.sum()),
        "longest_sample": int(store.lengths.max()),
        "validation_samples": len(run.validation) if run.validation is not None else 0,
        "samples_per_epoch": feed.samples_per_epoch,
        "steps_per_epoch": feed.steps_per_epoch,
        "total_steps": feed.total_steps,
        "tokens_per_pack": feed.settings.token_budget,
        "packed": feed.settings.is_packed,
        "chat_template": materials.template.name if materials.template else None,
        "data": materials.prepared.report,
    }


def summary(plan: dict[str, Any]) -> str:
    """The plan in one line."""
    share = plan["trained_tokens"] / max(1, plan["tokens"])
    return (
        f"plan: {plan['total_steps']:,} steps over {plan['samples']:,} samples, {plan['tokens']:,} tokens "
        f"({share:.0%} trained); {plan['trained_parameters']:,} of {plan['parameters']:,} parameters, "
        f"{plan['dtype']} on {plan['device']}, packs of {plan['tokens_per_pack']:,} tokens"
    )


def final_metrics(run: Run, history: tuple[dict[str, Any], ...]) -> dict[str, float]:
    """The last values, and rates over the whole history."""
    if not history:
        return {}
    seconds = sum(row["step_seconds"] for row in history)
    metrics = {
        "loss": history[-1]["loss"],
        "steps": history[-1]["step"],
        "epochs": history[-1]["epoch"],
        "tokens": sum(row["tokens"] for row in history),
        "trained_tokens": sum(row["trained_tokens"] for row in history),
        "tokens_per_second": sum(row["tokens"] for row in history) / max(seconds, 1e-9),
        "memory_gib": max((row["memory_gib"] for row in history if row["memory_gib"] is not None), default=math.nan),
    }
    if run.validation_before is not None:
        metrics["validation_loss_before"] = run.validation_before
    measured = [row["validation_loss"] for row in history if row.get("validation_loss") is not None]
    if measured:
        metrics["validation_loss"] = measured[-1]
        metrics["validation_perplexity"] = perplexity(measured[-1])
    if run.best is not None:
        metrics["best_validation_loss"], metrics["best_step"] = run.best
    return metrics


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # training_hub run from its source folder is not an installed package
            found[name] = "not installed as a package"
    return found
