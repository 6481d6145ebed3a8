"""Commands beside those of the algorithms: they take the recipe of `training-hub sft` and options of their own."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from training_hub.frontends.commands import (
    chat,
    check,
    continual,
    evaluate,
    manifests,
    merge,
    plan,
    preview,
    slurm,
    verify,
)
from training_hub.recipe import Recipe


@dataclass(frozen=True)
class Command:
    """One command: what it is for, its options beside those of the recipe, and what it does.

    goes_without: settings that need not be given: `output`, where it writes into no run folder. takes_tokenizer:
    model.tokenizer alone is enough, since no weight and no config is read. without_rows: whether its options make
    data.path needless. usage: where it is not that of a run.
    """

    help: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Recipe, Namespace], int]
    takes_tokenizer: bool = False
    without_rows: Callable[[Namespace], bool] = lambda options: False
    goes_without: tuple[str, ...] = ("output",)
    usage: str = ""


@dataclass(frozen=True)
class PlainCommand:
    """A command that takes no recipe: what it is for, its options, and what it does."""

    help: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "preview": Command(
            "show rows as they will be trained, token by token", preview.add_options, preview.run, takes_tokenizer=True
        ),
        "check": Command(
            "prove on the model and its rows what training relies on, without training", check.add_options, check.run
        ),
        "plan": Command(
            "say what a run will do and take, without loading weights",
            plan.add_options,
            plan.run,
            without_rows=lambda options: options.world_size is not None,
        ),
        "verify": Command(
            "run a few steps in one process and in the recipe's own layout, and compare the numbers",
            verify.add_options,
            verify.run,
        ),
        "eval": Command(
            "let saved models answer rows, and compare what they say with what the rows say",
            evaluate.add_options,
            evaluate.run,
            usage=evaluate.USAGE,
        ),
        "chat": Command(
            "talk to a saved model, beside another if you like",
            chat.add_options,
            chat.run,
            goes_without=("output", "data.path"),
            usage=chat.USAGE,
        ),
        "merge": Command(
            "write an adapter and its base as one model, and measure how far it lies from the two",
            merge.add_options,
            merge.run,
            goes_without=("model.path", "data.path"),
            usage=merge.USAGE,
        ),
        "continual": Command(
            "learn tasks one after the other by several methods, and measure what each forgets",
            continual.add_options,
            continual.run,
            goes_without=("data.path",),
            usage=continual.USAGE,
        ),
        "slurm submit": Command(
            "check a run and send it to Slurm, where it saves before it is stopped and goes on by itself",
            slurm.add_submit_options,
            slurm.submit,
            goes_without=(),
            usage=slurm.USAGE,
        ),
        "kubeflow": Command(
            "print a run as a TrainJob of Kubeflow Trainer 2",
            manifests.add_kubeflow_options,
            manifests.kubeflow,
            goes_without=(),
        ),
        "skypilot": Command(
            "print a run as a task of SkyPilot", manifests.add_skypilot_options, manifests.skypilot, goes_without=()
        ),
    }
)

PLAIN_COMMANDS: Mapping[str, PlainCommand] = MappingProxyType(
    {
        "slurm status": PlainCommand(
            "say how a job and its run stand: why it waits, its last step, how it ended and why",
            slurm.add_run_option,
            slurm.status,
        ),
        "slurm logs": PlainCommand("print the log of a job as it is written", slurm.add_logs_options, slurm.logs),
        "slurm cancel": PlainCommand(
            "end a job after its run has saved its state", slurm.add_cancel_options, slurm.cancel
        ),
    }
)

GROUPS: Mapping[str, str] = MappingProxyType(
    {"slurm": "send a run to Slurm, see how it stands, read its log, end it: submit, status, logs, cancel"}
)
"""What the first word of commands of two words is for."""
