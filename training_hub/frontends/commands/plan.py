"""`training-hub plan`: what a run will do and what it takes, without loading weights."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training_hub.errors import BackendError, RecipeError
from training_hub.recipe import Recipe

MEASURE = "measure"
MEMORY = (
    ("libraries", "Python and libraries"),
    ("products", "what a library keeps for products of many sizes"),
    ("weights", "weights"),
    ("masters", "float32 masters of the weights"),
    ("gathered", "weights that are gathered at once"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer state"),
    ("activations", "activations of the largest pack"),
    ("logits", "a chunk of logits, and what multiplies it"),
    ("buffers", "gradients on their way to slices"),
    ("teacher", "teacher: its weights, states and a chunk of its logits, or what is kept of its word"),
    ("staged", "copies of what a checkpoint holds, in the host's memory"),
    ("gaps", "lost by the allocator between blocks"),
    ("start", "before the first step, while matrices are decomposed, beside libraries"),
    ("total", "at the fullest moment of a step, or before"),
)


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--rate",
        metavar="RUN",
        help="how fast: a run folder or its metrics.jsonl, for a time estimate at the rate of that run; or `measure`, "
        "for a bound from below by one matrix product measured now (default: no time is told)",
    )
    on_paper = parser.add_argument_group(
        "plan on paper", "layouts on so many devices, from the shape of the model alone"
    )
    on_paper.add_argument(
        "--world-size",
        metavar="N",
        help="compare layouts on N devices: memory and messages of each, and which to take. No data and no device is "
        "needed; --model is a folder with a config.json or one of the models whose shapes are known by name",
    )
    on_paper.add_argument("--gpu", metavar="KIND", help="a100, h100 (default), h200 or b200")
    on_paper.add_argument("--gpu-memory", metavar="GIB", help="memory of a device, where it is not that of its kind")
    on_paper.add_argument("--gpus-per-node", metavar="N", help="devices of a host (default: 8)")
    group.add_argument("--json", action="store_true", help="print the plan as JSON, as a run writes it into plan.json")


def run(recipe: Recipe, options: Namespace) -> int:
    """Print the plan. The data is read and tokenised, and kept for the run where data.cache says so."""
    if options.world_size is not None:
        from training_hub.frontends.commands import on_paper

        return on_paper.run(recipe, options)
    unused = [name for name in ("gpu", "gpu_memory", "gpus_per_node") if getattr(options, name) is not None]
    if unused:
        names = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise RecipeError(f"{names}: would change nothing without --world-size. Write --world-size 8, or leave it out.")
    from training_hub.algorithms import engine_of
    from training_hub.backends import Planner, find_backend
    from training_hub.monitoring.console import open_console

    rate = _rate(Path(options.rate)) if options.rate not in (None, MEASURE) else None
    engine = find_backend(engine_of(recipe))
    if not isinstance(engine, Planner):
        raise BackendError(
            f"backend {engine.name!r} makes no plans: it has no method plan(recipe, console, measures=...)."
        )
    console = open_console(recipe.monitoring.console, sys.stderr)
    plan = engine.plan(recipe, console, measures=options.rate == MEASURE)
    if rate is not None:
        plan["time"] = {"seconds": plan["run"]["tokens"] / rate[0], "basis": rate[1]}
    if options.json:
        print(json.dumps(plan, indent=2))
    else:
        print("\n".join(lines(plan)))
    return 0


def lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The plan in words."""
    steps, lengths = plan["run"], plan["lengths"]
    yield (
        f"model     {plan['trained_parameters']:,} of {plan['parameters']:,} parameters trained, in {plan['dtype']} "
        f"on {plan['device']}; saved as {plan['save_dtype']}"
    )
    if (count := plan["processes"]) > 1:
        samples, sent = plan["samples_per_step"], plan["exchanged_gib_per_step"]
        split = {"heads": 1, "tokens": 1, "experts": 1, **plan.get("split_among", {})}
        parts, stages = plan["slices"] * split["heads"], plan.get("pipeline", {"processes": 1})["processes"]
        part = "the whole model" if parts == 1 else f"{'about ' if split['heads'] > 1 else ''}1/{parts} of the model"
        part = f"its layers of {part}" if stages > 1 else part
        of_pack = f", 1/{split['tokens']} of the tokens of a pack," if split["tokens"] > 1 else ""
        own = samples * split["heads"] * split["tokens"] * stages / count
        yield (
            f"processes {count}, each with {part}{of_pack} and about {own:.1f} of the {samples:,} samples "
            f"of a step; each sends {sent:.2g} GiB a step"
        )
    trained = _share(plan["trained_tokens"], plan["tokens"])
    yield f"data      {plan['samples']:,} samples, {plan['tokens']:,} tokens, {trained} trained"
    quantiles = ", ".join(f"{name} {lengths[name]:,}" for name in ("p50", "p90", "p99", "max"))
    yield f"lengths   {quantiles} tokens; training.max_seq_len is {lengths['max_seq_len']:,}"
    if plan["validation_samples"]:
        yield f"checked   on {plan['validation_samples']:,} validation samples"
    yield f"steps     {plan['total_steps']:,}, {plan['steps_per_epoch']:,} an epoch"
    about = "" if steps["steps_laid_out"] == plan["total_steps"] else "about "
    yield (
        f"in all    {about}{steps['samples']:,} samples, {about}{steps['tokens']:,} tokens, "
        f"{about}{steps['trained_tokens']:,} of them trained"
    )
    how = "" if plan["packed"] else ", one sample each"
    yield (
        f"packs     {about}{steps['packs']:,} of {plan['tokens_per_pack']:,} tokens{how}; "
        f"{steps['packs_per_step']:.1f} a step, {steps['fill']:.1%} full"
    )
    if "pipeline" in plan:
        found = plan["pipeline"]
        yield (
            f"stages    of {', '.join(map(str, found['layers']))} layers, {found['schedule']}; with "
            f"{found['packs']:.1f} packs a step one stage would wait {found['waiting']:.0%} of the time"
        )
    if "teacher" in plan:
        words = {"none": "asked in each step", "top_k": "its likeliest tokens kept", "sampled": "draws from it kept"}
        yield f"teacher   {plan['teacher']['path']}, {plan['teacher']['divergence']}; {words[plan['teacher']['cache']]}"
    yield from _memory_lines(plan["memory_gib"], plan["device"])
    yield from _time_lines(plan.get("time"))


def _memory_lines(memory: Mapping[str, Any], device: str) -> Iterator[str]:
    unit, scale = ("GiB", 1) if memory["total"] >= 1 else ("MiB", 1024)
    yield f"memory    estimated from shapes, in {unit}, on {device}"
    for key, what in MEMORY:
        if memory.get(key) is not None:
            yield f"{memory[key] * scale:>14,.2f}  {what}"
    if memory["note"]:
        yield f"          {memory['note']}; what is added up is without them"


def _time_lines(time: Mapping[str, Any] | None) -> Iterator[str]:
    from training_hub.monitoring.words import duration

    if time is None:
        yield "time      not estimated; --rate RUN_FOLDER takes the rate of an earlier run, --rate measure a bound"
    elif "seconds" in time:
        yield f"time      {duration(time['seconds'])} in steps, at {time['basis']}"
    else:
        least = duration(time["at_least_seconds"])
        yield f"time      at least {least} for the matrix products alone, by {time['basis']}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(1, whole):.0%})"


def _rate(path: Path) -> tuple[float, str]:
    """Tokens per second over the steps of an earlier run, and where that comes from.

    The first step is left out where there are others: it waits for kernels and caches.
    """
    from training_hub.monitoring.jsonl import FILE_NAME, read_metrics

    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"--rate: there is no file {file}. Name a run folder, its {FILE_NAME}, or write {MEASURE}.")
    rows = [row for row in read_metrics(file) if row.get("step_seconds")]
    rows = rows[1:] or rows
    if not rows:
        raise RecipeError(f"--rate: {file} holds no step. Name the {FILE_NAME} of a run that took steps.")
    rate = sum(row["tokens"] for row in rows) / sum(row["step_seconds"] for row in rows)
    return rate, f"{rate:,.0f} tokens per second, measured over {len(rows):,} steps in {file}"
