"""Settings that contradict each other, or that would be accepted and do nothing: found before anything is loaded.

`contradictions` needs nothing but the settings: every Recipe that exists is free of them, however it was made.
`unmet` asks what the settings do not hold (live rows, users of this machine), and is asked where a recipe is built.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from training_hub.recipe.check_after import CHECKS
from training_hub.recipe.check_data import about_streaming, about_validation
from training_hub.recipe.check_distillation import about_the_teacher
from training_hub.recipe.check_parallelism import about_layouts
from training_hub.recipe.evaluation import needs_validation
from training_hub.recipe.findings import Contradiction, Names, is_default, plainly, value_at
from training_hub.recipe.lora import Lora, adapter_problems
from training_hub.recipe.osft import Osft
from training_hub.recipe.qat import qat_problems
from training_hub.recipe.secrets import secret_in, texts_in

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

# Two ways to say one thing. Where the caller names one, a default of the other gives way.
RIVALS: tuple[tuple[str, str], ...] = (
    ("training.epochs", "training.steps"),
    ("lr_scheduler.warmup_steps", "lr_scheduler.warmup_ratio"),
    ("data.validation", "data.validation_fraction"),
    ("processes.rdzv_endpoint", "processes.master_addr"),
    ("osft.unfreeze_rank_ratio", "osft.energy"),
)

TORCH_ADAM = ("AdamW", "Adam", "NAdam", "RAdam")
# Whose steps have about the size of the learning rate, and which have an eps.
ADAM = (*TORCH_ADAM, "Muon", "AdamWScheduleFree", "GaLoreAdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit")
LION = ("Lion", "Lion8bit", "PagedLion", "PagedLion8bit")
# Peak learning rate of the Adam family above which a run says so.
HIGH_RATE = 1e-2

# Setting -> (the setting it depends on, the values under which it does something).
NEEDS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "data.block_size": ("data.pretraining", (True,)),
    "checkpoint.max_shard_size": ("checkpoint.final", (True,)),
    "data.cache_dir": ("data.cache", (True,)),
    "data.cache_size": ("data.cache", (True,)),
    "data.max_bad_share": ("data.on_bad_row", ("skip",)),
    "training.activation_memory_budget": ("training.activation_checkpointing", ("memory_budget",)),
    "training.max_skipped": ("training.on_nonfinite", ("skip",)),
    "optimizer.beta1": ("optimizer.name", (*ADAM, *LION)),
    "optimizer.beta2": ("optimizer.name", (*ADAM, *LION)),
    "optimizer.eps": ("optimizer.name", (*ADAM, "Adagrad", "RMSprop")),
    "optimizer.momentum": ("optimizer.name", ("SGD", "RMSprop", "Muon")),
    "optimizer.galore_rank": ("optimizer.name", ("GaLoreAdamW",)),
    "optimizer.galore_interval": ("optimizer.name", ("GaLoreAdamW",)),
    "optimizer.galore_scale": ("optimizer.name", ("GaLoreAdamW",)),
    "optimizer.state": ("optimizer.name", ("AdamW",)),
    **{
        f"freezing.{name}": ("algorithm", ("sft",))
        for name in ("blocks", "embeddings", "weights", "unfreeze_interval", "unfrozen_blocks")
    },
    "osft.least_kept": ("osft.importance", (True,)),
    "lr_scheduler.min_lr": ("lr_scheduler.name", ("cosine", "linear", "wsd")),
    "lr_scheduler.decay_ratio": ("lr_scheduler.name", ("wsd",)),
    **{f"osft.{name}": ("algorithm", ("osft",)) for name in Osft.model_fields if name != "least_kept"},
    **{f"lora.{name}": ("algorithm", ("lora_sft",)) for name in Lora.model_fields},
    **{f"qat.{name}": ("qat.weight_dtype", ("int4", "int8")) for name in ("activation_dtype", "group_size")},
    "distillation.beta": ("distillation.divergence", ("jensen_shannon",)),
    "distillation.top_k": ("distillation.cache", ("top_k",)),
    "distillation.samples": ("distillation.cache", ("sampled",)),
    "hub.repo_id": ("hub.push", (True,)),
    "hub.private": ("hub.push", (True,)),
    "monitoring.wandb_project": ("monitoring.wandb", (True,)),
    "monitoring.wandb_entity": ("monitoring.wandb", (True,)),
    "monitoring.wandb_run_name": ("monitoring.wandb", (True,)),
    "monitoring.mlflow_tracking_uri": ("monitoring.mlflow", (True,)),
    "monitoring.mlflow_experiment_name": ("monitoring.mlflow", (True,)),
    "monitoring.mlflow_run_name": ("monitoring.mlflow", (True,)),
}


# Settings in which ~ and ~user stand for a home folder.
IN_HOME = (
    "model.path",
    "model.tokenizer",
    "data.path",
    "data.validation",
    "data.chat_template",
    "data.cache_dir",
    "evaluation.watch",
    "lora.adapter",
    "distillation.teacher",
)


def contradictions(recipe: Recipe, names: Names) -> list[Contradiction]:
    """All settings of `recipe` that are at odds with each other, or that no run could be saved with."""
    checks: tuple[Callable[[Recipe, Names], Iterator[Contradiction]], ...] = (
        _given_both_ways,
        _without_effect,
        _lengths,
        _pretraining,
        _learning_rate,
        _optimizer_state,
        _averaging,
        _freezing,
        _osft,
        _adapters,
        _watch,
        about_streaming,
        about_validation,
        *CHECKS,
        _distillation,
        _processes,
        about_layouts,
    )
    unusable = list(_unusable_texts(recipe, names))
    found = [one for check in checks for one in check(recipe, names)]
    # A text that cannot be used is neither compared with anything nor repeated: it may be a password.
    named = {path for one in unusable for path in one.paths}
    return unusable + [one for one in found if not named.intersection(one.paths)]


def unmet(recipe: Recipe, names: Names, live: Collection[str] = ()) -> list[Contradiction]:
    """What `recipe` relies on and is not there: validation rows, a user whose home is named.

    live: paths that a live object stands in for (`data.validation`).
    """
    rows = [] if "data.validation" in live else list(_validation(recipe, names))
    return [*_homes(recipe, names), *rows]


def _given_both_ways(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for first, second in RIVALS:
        if not is_default(recipe, first) and not is_default(recipe, second):
            yield Contradiction(
                (first, second),
                f"{names(first)} and {names(second)}: both are given, and one excludes the other. Leave one out.",
            )


def _without_effect(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for path, (owner, values) in NEEDS.items():
        if is_default(recipe, path) or value_at(recipe, owner) in values:
            continue
        wanted = " or ".join(f"{owner}: {plainly(value)}" for value in values)
        yield Contradiction(
            (path, owner),
            f"{names(path)}: {plainly(value_at(recipe, path))} would change nothing while {names(owner)} is "
            f"{plainly(value_at(recipe, owner))}; it needs {wanted}. Set that, or leave {path} out.",
        )


def _lengths(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    budget, longest = recipe.training.max_tokens_per_gpu, recipe.training.max_seq_len
    if budget is not None and budget < longest:
        # instructlab-training names the two so, and its users look for these words.
        paths = ("training.max_tokens_per_gpu", "training.max_seq_len")
        yield Contradiction(
            paths,
            f"{names(paths[0])}: the `max_batch_len` cannot be less than `max_seq_len`: {budget} tokens per device "
            f"cannot hold a sample of {longest}. Write {names.write(paths[0], longest)}, or lower {names(paths[1])}.",
        )
    block = recipe.data.block_size
    if recipe.data.pretraining and block is not None and budget is not None and budget < block:
        paths = ("training.max_tokens_per_gpu", "data.block_size")
        yield Contradiction(
            paths,
            f"{names(paths[0])}: {budget} tokens per device cannot hold a block of {block} ({names(paths[1])}). "
            f"Write {names.write(paths[0], block)}, or lower {names(paths[1])}.",
        )


def _pretraining(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if recipe.data.pretraining and recipe.data.unmask:
        # The words of training_hub, which programs match.
        yield Contradiction(
            ("data.pretraining", "data.unmask"),
            "Cannot use both is_pretraining=True and unmask_messages=True. These are mutually exclusive modes.",
        )


def _learning_rate(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    peak, schedule = recipe.optimizer.lr, recipe.lr_scheduler
    if schedule.min_lr > peak:
        yield Contradiction(
            ("lr_scheduler.min_lr", "optimizer.lr"),
            f"{names('lr_scheduler.min_lr')}: found {schedule.min_lr}; allowed: at most {names('optimizer.lr')}, "
            f"which is {peak}. Write {names.write('lr_scheduler.min_lr', peak / 10)}.",
        )
    if peak > 1 and recipe.optimizer.name != "SGD":  # all others scale gradients to about 1
        yield Contradiction(
            ("optimizer.lr",),
            f"{names('optimizer.lr')}: found {peak}; {recipe.optimizer.name} moves every weight by about this much in "
            f"each step, so more than 1 only destroys the model. Write {names.write('optimizer.lr', 1e-5)}.",
        )
    if schedule.name == "wsd" and (schedule.warmup_ratio or 0) + schedule.decay_ratio > 1:
        yield Contradiction(
            ("lr_scheduler.warmup_ratio", "lr_scheduler.decay_ratio"),
            f"{names('lr_scheduler.warmup_ratio')} and {names('lr_scheduler.decay_ratio')}: {schedule.warmup_ratio} + "
            f"{schedule.decay_ratio} is more than the whole run. Lower one, so that their sum is at most 1.",
        )


def _optimizer_state(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if (
        recipe.optimizer.name.startswith("Paged") or recipe.optimizer.name.endswith("8bit")
    ) and recipe.model.dtype == "float64":
        yield Contradiction(
            ("optimizer.name", "model.dtype"),
            f"{names('optimizer.name')}: {recipe.optimizer.name} computes in float32, {names('model.dtype')} is "
            f"float64. Write {names.write('optimizer.name', 'AdamW')}.",
        )
    if recipe.optimizer.state != "full" and recipe.model.dtype == "float64":
        yield Contradiction(
            ("optimizer.state", "model.dtype"),
            f"{names('optimizer.state')}: {recipe.optimizer.state} computes in float32, {names('model.dtype')} is "
            f"float64. Write {names.write('optimizer.state', 'full')}.",
        )


def _averaging(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if recipe.optimizer.name != "AdamWScheduleFree":
        return
    schedule, thaw = "lr_scheduler.name", "freezing.unfreeze_interval"
    if recipe.lr_scheduler.name != "constant":
        yield Contradiction(
            ("optimizer.name", schedule),
            f"{names('optimizer.name')}: AdamWScheduleFree averages its steps in place of a falling rate, and "
            f"{names(schedule)} is {recipe.lr_scheduler.name}. Write {names.write(schedule, 'constant')}; warm-up is "
            "kept.",
        )
    if recipe.freezing.unfreeze_interval is not None:
        yield Contradiction(
            ("optimizer.name", thaw),
            f"{names(thaw)}: AdamWScheduleFree counts its steps once for all weights, so that none can begin later. "
            f"Write {names.write('optimizer.name', 'AdamW')}, or leave {thaw} out.",
        )


def _freezing(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    path, interval = "freezing.unfrozen_blocks", "freezing.unfreeze_interval"
    if recipe.freezing.unfreeze_interval is None and not is_default(recipe, path):
        yield Contradiction(
            (path, interval),
            f"{names(path)}: {recipe.freezing.unfrozen_blocks} would change nothing while {names(interval)} is null. "
            f"Write {names.write(interval, 100)}, or leave {path} out.",
        )


def _osft(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if recipe.algorithm != "osft":
        return
    ratio, energy = "osft.unfreeze_rank_ratio", "osft.energy"
    if recipe.osft.unfreeze_rank_ratio is None and recipe.osft.energy is None:
        yield Contradiction(
            (ratio, energy),
            f"{names(ratio)}: not given; allowed: a number of at least 0 and at most 1. "
            f"Write {names.write(ratio, 0.3)}",
        )
    if recipe.osft.importance:
        yield from _osft_importance(recipe, names)
    if recipe.optimizer.name == "Adafactor":
        yield Contradiction(
            ("optimizer.name",),
            f"{names('optimizer.name')}: Adafactor makes its steps in proportion to a weight, and OSFT trains "
            f"differences that begin at 0. Write {names.write('optimizer.name', 'AdamW')}",
        )
    if recipe.optimizer.name in ("Muon", "GaLoreAdamW", "AdamWScheduleFree"):
        yield Contradiction(
            ("optimizer.name", "algorithm"),
            f"{names('optimizer.name')}: {recipe.optimizer.name} makes its steps from whole matrices or averages "
            "weights, and OSFT projects after each step what it moved. "
            f"Write {names.write('optimizer.name', 'AdamW')}",
        )


def _adapters(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for paths, message in (*adapter_problems(recipe, names), *qat_problems(recipe, names)):
        yield Contradiction(paths, message)


def _osft_importance(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    importance, ratio, least = "osft.importance", "osft.unfreeze_rank_ratio", "osft.least_kept"
    share = recipe.osft.unfreeze_rank_ratio
    if recipe.evaluation.watch is None:
        yield Contradiction(
            (importance, "evaluation.watch"),
            f"{names(importance)}: measured on the rows of {names('evaluation.watch')}, which is not given. Write "
            f"{names.write('evaluation.watch', 'general.jsonl')}, with rows of what must not be forgotten.",
        )
    if share is None or share in (0, 1):
        yield Contradiction(
            (importance, ratio),
            f"{names(importance)}: shares out {names(ratio)}, which is {plainly(share)}; allowed: between 0 and 1. "
            f"Write {names.write(ratio, 0.3)}, or leave {importance} out.",
        )
    elif recipe.osft.least_kept > 1 - share:
        yield Contradiction(
            (least, ratio),
            f"{names(least)}: found {recipe.osft.least_kept:g}, but with {names(ratio)} {share:g} blocks keep "
            f"{1 - share:g} on average. Write {names.write(least, 0.1)}, or a smaller {ratio}.",
        )


def _watch(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for path in ("evaluation.watch_interval", "evaluation.watch_limit"):
        if recipe.evaluation.watch is None and not is_default(recipe, path):
            yield Contradiction(
                (path, "evaluation.watch"),
                f"{names(path)}: {plainly(value_at(recipe, path))} would change nothing, since no rows are watched. "
                f"Write {names.write('evaluation.watch', 'general.jsonl')}, or leave {path} out.",
            )


def _distillation(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    # What needs another setting has been told.
    return (found for found in about_the_teacher(recipe, names) if found.paths[0] not in NEEDS)


def _processes(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    processes = recipe.processes
    if isinstance(processes.procs, int) and processes.procs < 1:
        yield Contradiction(
            ("processes.procs",),
            f"{names('processes.procs')}: found {processes.procs}; allowed: a whole number of at least 1, auto or gpu. "
            f"Write {names.write('processes.procs', 1)}.",
        )
    if processes.node_rank >= processes.nodes:
        yield Contradiction(
            ("processes.node_rank", "processes.nodes"),
            f"{names('processes.node_rank')}: found {processes.node_rank}; allowed: 0 to {processes.nodes - 1}, since "
            f"{names('processes.nodes')} is {processes.nodes}.",
        )
    if processes.master_port is not None and processes.master_addr is None:
        yield Contradiction(
            ("processes.master_port", "processes.master_addr"),
            f"{names('processes.master_port')}: found {processes.master_port} without a host. Write "
            f"{names.write('processes.master_addr', 'HOST')}.",
        )


def _unusable_texts(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    """Texts that cannot be saved with the run, or must not be."""
    for path, text in texts_in(recipe.model_dump(mode="python")):
        secret = secret_in(text, path)
        if secret:
            yield Contradiction(
                (path,),
                f"{names(path)}: holds {secret}, and the recipe is saved with the run. Give it in an environment "
                "variable (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD) and leave "
                "it out here.",
            )
        elif "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            yield Contradiction(
                (path,),
                f"{names(path)}: found {ascii(text)[:80]}, which holds a NUL or bytes that are not UTF-8; no file and "
                "no saved recipe can be called so. Rename it.",
            )


def _homes(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    for path, text in texts_in(recipe.model_dump(mode="python")):
        if path in IN_HOME and text.startswith("~") and os.path.expanduser(text) == text and not secret_in(text):
            yield Contradiction(
                (path,), f"{names(path)}: found {text!r}, but there is no such user. Write the whole path."
            )


def _validation(recipe: Recipe, names: Names) -> Iterator[Contradiction]:
    if recipe.data.validation or recipe.data.validation_fraction:
        return
    for path, value in needs_validation(recipe):
        yield Contradiction(
            (path, "data.validation", "data.validation_fraction"),
            f"{names(path)}: {plainly(value)} needs validation rows, and there are none. "
            f"Write {names.write('data.validation_fraction', 0.05)}, or give a file as data.validation.",
        )


def cautions(recipe: Recipe) -> list[str]:
    """What is allowed and yet seldom meant, to be said aloud when a run begins.

    A high learning rate is not refused: small models trained from scratch take it, a pretrained one is destroyed by it,
    and the recipe does not tell which it is. A switch to force it would be set once, in a file, and forgotten.
    """
    peak = recipe.optimizer.lr
    if recipe.optimizer.name in (*ADAM, *LION) and peak > HIGH_RATE:
        return [
            f"optimizer.lr: {peak:g} is far above what a pretrained model takes with {recipe.optimizer.name} "
            "(1e-6 to 1e-4); go on only with a small model that is trained from scratch"
        ]
    return []
