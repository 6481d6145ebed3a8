"""What is at odds in the sections about a run's results: evaluation by generation, the best step, the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from training_hub.recipe.evaluation import metric_problems, names_of
from training_hub.recipe.findings import Contradiction, Names, is_default, plainly, value_at
from training_hub.recipe.hub import REPO_ID

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)?\s*[KMGT]B")
"""A size of a file, as transformers reads it; more than nothing."""


def _generation(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    asked = recipe.evaluation
    for problem in metric_problems(asked.metrics):
        yield Contradiction(("evaluation.metrics",), f"{names('evaluation.metrics')}: {problem}")
    for name in ("metrics", "max_new_tokens", "batch_tokens", "temperature"):
        path = f"evaluation.{name}"
        if not asked.generate and not is_default(recipe, path):
            yield Contradiction(
                (path, "evaluation.generate"),
                f"{names(path)}: {plainly(value_at(recipe, path))} would change nothing, since nothing is generated. "
                f"Write {names.write('evaluation.generate', True)}, or leave {path} out.",
            )
    if asked.temperature == 0 and not is_default(recipe, "evaluation.top_p"):
        yield Contradiction(
            ("evaluation.top_p", "evaluation.temperature"),
            f"{names('evaluation.top_p')}: {asked.top_p} would change nothing at temperature 0, which takes the "
            f"likeliest token. Write {names.write('evaluation.temperature', 0.7)}, or leave evaluation.top_p out.",
        )
    if asked.generate and recipe.data.pretraining:
        yield Contradiction(
            ("evaluation.generate", "data.pretraining"),
            f"{names('evaluation.generate')}: blocks of text ({names('data.pretraining')}) ask nothing that could be "
            "answered. Leave one out.",
        )


def _best(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    asked, metric = recipe.evaluation, "evaluation.best_metric"
    if asked.best_metric not in names_of(asked):
        remedy = "" if asked.generate else f" Others need {names.write('evaluation.generate', True)}."
        yield Contradiction(
            (metric, "evaluation.generate", "evaluation.metrics"),
            f"{names(metric)}: {asked.best_metric!r} is not measured; measured: {', '.join(names_of(asked))}.{remedy}",
        )
    for path in (metric, "evaluation.best_mode"):
        if not (recipe.checkpoint.keep_best or asked.early_stopping_patience or is_default(recipe, path)):
            yield Contradiction(
                (path, "checkpoint.keep_best", "evaluation.early_stopping_patience"),
                f"{names(path)}: {value_at(recipe, path)} would change nothing. Write "
                f"{names.write('checkpoint.keep_best', True)} or {names.write('evaluation.early_stopping_patience', 3)}"
                f", or leave {path} out.",
            )
    if asked.early_stopping_patience is None and not is_default(recipe, "evaluation.early_stopping_min_delta"):
        yield Contradiction(
            ("evaluation.early_stopping_min_delta", "evaluation.early_stopping_patience"),
            f"{names('evaluation.early_stopping_min_delta')}: {asked.early_stopping_min_delta} would change nothing. "
            f"Write {names.write('evaluation.early_stopping_patience', 3)}, or leave it out.",
        )


def _hub(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    asked = recipe.hub
    if asked.push and (asked.repo_id is None or not REPO_ID.fullmatch(asked.repo_id)):
        found = "not given" if asked.repo_id is None else f"found {asked.repo_id!r}"
        yield Contradiction(
            ("hub.repo_id", "hub.push"),
            f"{names('hub.repo_id')}: {found}; allowed: OWNER/NAME of letters, digits, - _ and dots. Write "
            f"{names.write('hub.repo_id', 'me/my-model')}",
        )
    if asked.push and not recipe.checkpoint.final:
        yield Contradiction(
            ("hub.push", "checkpoint.final"),
            f"{names('hub.push')}: there is nothing to upload while {names('checkpoint.final')} is false. Leave one "
            "out.",
        )


def _shards(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    path, chosen = "checkpoint.max_shard_size", recipe.checkpoint.max_shard_size
    if not SIZE.fullmatch(chosen):
        yield Contradiction(
            (path,),
            f"{names(path)}: found {chosen!r}; allowed: a number with KB, MB, GB or TB. Write "
            f"{names.write(path, '50GB')}.",
        )
    elif recipe.algorithm == "lora_sft" and not recipe.lora.merge and not is_default(recipe, path):
        yield Contradiction(
            (path, "lora.merge"),
            f"{names(path)}: {chosen} would change nothing, since the final model is an adapter in one file. Write "
            f"{names.write('lora.merge', True)}, or leave {path} out.",
        )


Apart = tuple[tuple[str, tuple[Any, ...], str], ...]
"""What a setting does not go with: another, its values that go, and why no others do."""

UNCOMPILED: Apart = (
    ("lora.tuner", ("lora", "rslora", "dora", "pissa", "olora", "adalora"), "no other tuner was tried beside it"),
    ("training.fp8", (False,), "products in 8 bits are kernels of their own, which were not tried beside it"),
    ("qat.weight_dtype", (None,), "what differs by a hair is rounded to another number, and the loss with it"),
    (
        "parallelism.pipeline_parallel_schedule",
        ("1F1B", "Interleaved1F1B", "GPipe"),
        "a compiled block makes gradients of weights and of activations in one piece",
    ),
)
"""What blocks are not compiled beside. Layers that round were tried."""

FORGETTING = ("selective", "full", "offload")


def _compiled(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    path, how = "training.compile", "training.activation_checkpointing"
    asked = recipe.training
    if asked.activation_checkpointing == "memory_budget" and not asked.compile:
        yield Contradiction(
            (how, path),
            f"{names(how)}: memory_budget is kept by the compiler, and {names(path)} is false. Write "
            f"{names.write(path, True)}, or {names.write(how, 'auto')}.",
        )
    if not asked.compile:
        return
    if asked.activation_checkpointing in FORGETTING:
        yield Contradiction(
            (path, how),
            f"{names(path)}: torch compiles nothing within a layer that {names(how)}: {asked.activation_checkpointing} "
            f"runs again. Write {names.write(how, 'memory_budget')}, or none.",
        )
    yield from _apart(recipe, names, path, UNCOMPILED)


UNRECORDED: Apart = (
    ("algorithm", ("sft", "lora_sft"), "others look at gradients, or at further models, between two operations"),
    ("training.compile", (False,), "compiled blocks were not tried within a graph"),
    ("training.fp8", (False,), "weights in 8 bits are kept from pack to pack"),
    ("training.activation_checkpointing", ("auto", "none"), "layers that run again ask the host for random numbers"),
    ("model.attention", ("auto", "varlen"), "attention by documents is called as the host reads their lengths"),
    ("lora.tuner", ("lora", "rslora", "dora", "pissa", "olora"), "no other tuner was tried within a graph"),
    ("model.quantization", ("none",), "kernels of quantised weights were not tried within a graph"),
    ("qat.weight_dtype", (None,), "rounding was not tried within a graph"),
    ("qat.activation_dtype", (None,), "rounding was not tried within a graph"),
    ("data.packing", (True,), "packs are filled up with further documents"),
    ("distillation.teacher", (None,), "the host looks up what a teacher says"),
    ("loss.neftune_noise_alpha", (0,), "the host reads the lengths of documents for its noise"),
    ("freezing.unfreeze_interval", (None,), "what trains must stay the same"),
    ("monitoring.profile", (False,), "a graph cannot be taken apart"),
)
"""What packs are not recorded beside."""


def _recorded(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if recipe.training.cuda_graphs:
        yield from _apart(recipe, names, "training.cuda_graphs", UNRECORDED)


def _apart(recipe: Recipe, names: Names, path: str, goes: Apart) -> Iterator[Contradiction]:
    """What stands beside the setting, which is true, and does not go with it."""
    for other, values, reason in goes:
        found = value_at(recipe, other)
        if found not in values:
            yield Contradiction(
                (path, other),
                f"{names(path)}: true does not go with {names(other)}: {plainly(found)}, since {reason}. Write "
                f"{names.write(path, False)}.",
            )


CHECKS = (_generation, _best, _hub, _shards, _compiled, _recorded)
