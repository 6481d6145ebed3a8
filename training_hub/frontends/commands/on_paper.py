"""`training-hub plan --world-size N`: layouts of a model on devices that are not here, and which one to take."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.names import all_settings, nearest
from training_hub.recipe.parallelism import EXPERTS, FIELDS, Degrees
from training_hub.scaling.choose import (
    DEVICES,
    GIB,
    NAMES,
    ROOM,
    Candidate,
    Cluster,
    best,
    by_family,
    candidates,
    family,
    reasons,
    told,
)
from training_hub.scaling.formulas import Work
from training_hub.scaling.models import Shape, shape_of

TOKENS_AT_ONCE = 8192
"""Tokens of a data rank at once, where training.max_tokens_per_gpu does not say."""


@dataclass(frozen=True)
class Comparison:
    """All layouts of a model on a cluster: the best of each family, and the one to take (None where none fits)."""

    shape: Shape
    cluster: Cluster
    work: Work
    memory_gib: float
    families: Sequence[Candidate]
    chosen: Candidate | None


def run(recipe: Recipe, options: Namespace) -> int:
    """Print the comparison, in words or as JSON."""
    found = compare(recipe, options)
    print(json.dumps(as_json(found), indent=2) if options.json else "\n".join(lines(found)))
    return 0


COUNTED = ("auto", "none", "selective", "full")
"""Ways to forget activations whose memory and time are known from the shape of a model."""


def compare(recipe: Recipe, options: Namespace) -> Comparison:
    """What the options ask for. Raises RecipeError listing what is wrong with them."""
    problems: list[str] = []
    world = _count("--world-size", options.world_size, problems)
    per_host = _count("--gpus-per-node", options.gpus_per_node, problems) if options.gpus_per_node else 8
    kind = options.gpu or "h100"
    if kind not in DEVICES:
        near = nearest(kind, DEVICES)
        problems.append(
            f"--gpu: found {kind!r}; known: {', '.join(DEVICES)}." + (f" Did you mean {near}?" if near else "")
        )
    memory = _gib(options.gpu_memory, problems)
    if options.rate is not None:
        problems.append("--rate: says how long a run takes here; leave it out with --world-size.")
    if recipe.algorithm != "sft":
        problems.append(
            f"algorithm: {recipe.algorithm}; layouts are compared for sft, in which every weight is trained."
        )
    if (how := recipe.training.activation_checkpointing) not in COUNTED:
        problems.append(
            f"training.activation_checkpointing: {how}; on paper there are {', '.join(COUNTED)}. Write auto."
        )
    if problems:
        raise RecipeError(problems)
    return comparison(shape_of(recipe.model.path), Cluster(DEVICES[kind], world, per_host), work_of(recipe), memory,
                      recipe.training.activation_checkpointing)  # fmt: skip


def comparison(
    shape: Shape, cluster: Cluster, work: Work, memory_gib: float | None = None, how: str = "auto"
) -> Comparison:
    """Every layout of a model on a cluster, by family. Raises RecipeError where none divides evenly."""
    memory = memory_gib or cluster.device.memory_gib
    found = candidates(shape, cluster, work, memory, how)
    if not found:
        raise RecipeError(
            f"--world-size: no layout of {shape.name} on {cluster.world_size} devices divides evenly. Take a power of "
            f"two, and a training.global_batch_size of at least {cluster.world_size} (found {work.samples})."
        )
    return Comparison(shape, cluster, work, memory, by_family(found), best(found))


def work_of(recipe: Recipe) -> Work:
    """What a step of the recipe learns from."""
    length = recipe.training.max_seq_len
    at_once = recipe.training.max_tokens_per_gpu or max(TOKENS_AT_ONCE, length)
    rows = max(1, at_once // length)
    return Work(recipe.training.global_batch_size, length, rows, is_in_eight_bits=recipe.training.fp8)


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON; memory and messages in GiB."""
    return {
        "model": {**asdict(found.shape), "parameters": found.shape.parameters},
        "devices": {**asdict(found.cluster.device), "count": found.cluster.world_size, "memory_gib": found.memory_gib},
        "step": {"samples": found.work.samples, "tokens_per_sample": found.work.length},
        "layouts": [_as_json(one) for one in found.families],
        "chosen": _as_json(found.chosen) if found.chosen else None,
        "reasons": reasons(found.chosen, plain(found)) if found.chosen else [],
    }


def _as_json(one: Candidate) -> dict[str, Any]:
    return {
        "family": family(one.degrees),
        "layout": {
            **{name: getattr(one.degrees, key) for key, name in NAMES.items()},
            "checkpointing": one.work.checkpointing,
        },
        "fits": one.fits,
        "memory_gib": {**{name: size / GIB for name, size in asdict(one.memory).items()}, "total": one.memory_gib},
        "sent_gib": {
            **{name: size / GIB for name, size in asdict(one.traffic).items()},
            "total": one.traffic.total / GIB,
        },
        "seconds": {"computing": one.compute_seconds, "waiting": one.sending_seconds},
    }


def plain(found: Comparison) -> list[Candidate]:
    """The families that divide the model in at most one way beside the data, and the chosen one."""
    return [one for one in found.families if one.is_plain or one is found.chosen]


def lines(found: Comparison) -> Iterator[str]:
    """The comparison in words."""
    shape, work, chosen = found.shape, found.work, found.chosen
    used = f", {shape.active_parameters / 1e9:,.1f} B of them for each token" if shape.experts else ""
    yield f"model     {shape.name}: {shape.parameters / 1e9:,.1f} B parameters{used}; {shape.source}"
    yield (
        f"devices   {found.cluster.world_size:,} x {found.cluster.device.name} of {found.memory_gib:g} GiB, "
        f"{found.cluster.per_host} in a host; {ROOM:.0%} of the memory is planned"
    )
    yield f"step      {work.samples:,} samples of {work.length:,} tokens, {work.rows} of them at once on a data rank"
    if chosen is None:
        least = min(found.families, key=lambda one: one.memory_gib)
        yield f"take      more devices: the least is {least.memory_gib:,.0f} GiB on each ({family(least.degrees)})"
    else:
        yield (
            f"take      {family(chosen.degrees)}: {told(chosen.degrees)}; activation checkpointing "
            f"{chosen.work.checkpointing}; {chosen.memory_gib:,.1f} GiB, about {chosen.seconds:,.3g} s a step"
        )
        yield f"          {settings(chosen)}"
        missing = [path for path in paths(chosen.degrees) if path not in all_settings()]
        if missing:
            yield f"          (this version cannot train so yet: it has no {', '.join(missing)})"
        for number, why in enumerate(reasons(chosen, plain(found))):
            yield f"{'why' if number == 0 else '':10}{why}"
    yield ""
    yield from table(found)


def paths(degrees: Degrees) -> dict[str, int]:
    """The degrees that are not 1, by the paths of the recipe's settings."""
    fields = {**FIELDS, "ep": EXPERTS}
    return {f"parallelism.{fields[key]}": getattr(degrees, key) for key in NAMES if getattr(degrees, key) > 1}


def settings(one: Candidate) -> str:
    """A layout as settings of a recipe, behind any command."""
    given = [f"{path}={degree}" for path, degree in paths(one.degrees).items()]
    return " ".join([*given, f"training.activation_checkpointing={one.work.checkpointing}"])


HEAD = ("layout", "degrees", "forgets", "GiB", "state", "activations", "sent GiB", "s/step")


def rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    """The plain families and the chosen layout, as cells below HEAD."""
    shown = [*plain(found)]
    if found.chosen is not None and not any(one.degrees == found.chosen.degrees for one in shown):
        shown = [one if family(one.degrees) != family(found.chosen.degrees) else found.chosen for one in shown]
        shown = shown if found.chosen in shown else [found.chosen, *shown]
    for one in shown:
        mark = "* " if found.chosen is not None and one.degrees == found.chosen.degrees else ""
        yield (
            mark + family(one.degrees),
            told(one.degrees),
            one.work.checkpointing,
            f"{one.memory_gib:,.1f}" + ("" if one.fits else " (too much)"),
            f"{(one.memory.state + one.memory.gathered) / GIB:,.1f}",
            f"{(one.memory.activations + one.memory.logits) / GIB:,.1f}",
            f"{one.traffic.total / GIB:,.0f}",
            f"{one.seconds:,.3g}",
        )


def table(found: Comparison) -> Iterator[str]:
    """The rows in columns."""
    cells = [HEAD, *rows(found)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    for row in cells:
        texts = [
            text.ljust(width) if column < 3 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(texts).rstrip()


def _count(flag: str, text: str, problems: list[str]) -> int:
    if text.isdigit() and int(text) >= 1:
        return int(text)
    problems.append(f"{flag}: found {text!r}; allowed: a whole number of at least 1. Write {flag} 8")
    return 1


def _gib(text: str | None, problems: list[str]) -> float | None:
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        problems.append(f"--gpu-memory: found {text!r}; allowed: a number of GiB greater than 0. Write --gpu-memory 80")
    return found or None
