"""`training-hub slurm submit | status | logs | cancel`: a run as a job of Slurm."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from training_hub.frontends.commands.resources import add_resource_options, resources_of
from training_hub.recipe.recipe import Recipe

USAGE = """training-hub slurm submit --config FILE.yaml [--nodes N] [--gpus-per-node N] [--partition P] [--time T] ...
                                [--section.field VALUE ...] [section.field=VALUE ...]"""
RUN = "the `output` of a run that was submitted, or the number of its job"


def add_submit_options(parser: ArgumentParser) -> None:
    group = add_resource_options(parser, "slurm submit", "64G")
    group.add_argument("--job-name", metavar="NAME", help="name of the job (default: that of the output folder)")
    group.add_argument("--account", metavar="NAME", help="who pays (default: your own account)")
    group.add_argument("--partition", metavar="NAME", help="partition (default: the cluster's)")
    group.add_argument("--qos", metavar="NAME", help="quality of service")
    group.add_argument("--time", metavar="LIMIT", help="longest time, as Slurm writes it: 90, 8:00:00, 2-00:00:00")
    group.add_argument(
        "--signal",
        default="B:USR1@120",
        metavar="SIGNAL",
        help="when the run is told to save before its time is up: B:USR1@SECONDS or B:USR2@SECONDS through the batch "
        "script, or TERM@SECONDS to its processes (default: B:USR1@120)",
    )
    group.add_argument(
        "--no-requeue",
        dest="requeue",
        action="store_false",
        help="do not start again after a time limit or a preemption (default: start again, and go on)",
    )
    group.add_argument(
        "--container",
        metavar="IMAGE",
        help="an image for srun --container-image (pyxis), or a file of Apptainer (.sif)",
    )
    group.add_argument("--container-mounts", metavar="SOURCE:TARGET,...", help="what the container sees")
    group.add_argument("--python", metavar="PATH", help="the interpreter on the nodes (default: this one)")
    group.add_argument(
        "--before",
        action="append",
        default=[],
        metavar="LINE",
        help="a line of shell that comes first, such as 'module load cuda'; may be given again",
    )
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, written --sbatch=--constraint=h100; may be given again",
    )
    group.add_argument("--check-rows", action="store_true", help="also read and tokenise all rows before submitting")
    group.add_argument("--dry-run", action="store_true", help="print the batch script, and submit nothing")


def submit(recipe: Recipe, options: Namespace) -> int:
    """Submit the run, and say how it can be watched."""
    from training_hub.launch.slurm.control import submit as send
    from training_hub.launch.slurm.job import Job
    from training_hub.monitoring.console import open_console

    job = Job(
        resources=resources_of(recipe, options, options.container),
        name=options.job_name or Path(recipe.output).name or "training-hub",
        account=options.account,
        partition=options.partition,
        qos=options.qos,
        time=options.time,
        signal=options.signal,
        is_requeued=options.requeue,
        container_mounts=options.container_mounts,
        before=tuple(options.before),
        options=tuple(options.sbatch),
        python=options.python,
    )
    console = open_console(recipe.monitoring.console, sys.stderr) if options.check_rows else None
    sent = send(recipe, job, is_dry=options.dry_run, console=console)
    if options.dry_run:
        print(sent.text, end="")
    elif sent.job is None:
        print(f"already finished: {sent.output_dir} holds this run; nothing was submitted")
    else:
        print(f"submitted: job {sent.job}, {sent.script}")
        print(f"how it stands: training-hub slurm status {shlex.quote(recipe.output)}")
    return 0


def add_run_option(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN)


def status(options: Namespace) -> int:
    """Print how the job and its run stand."""
    from training_hub.launch.slurm.control import status as sentences

    print("\n".join(sentences(options.run)))
    return 0


def add_logs_options(parser: ArgumentParser) -> None:
    add_run_option(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="the log of one process (default: that of the job)")
    parser.add_argument(
        "--no-follow",
        dest="follow",
        action="store_false",
        help="only what is there (default: on, until the job is over)",
    )


def logs(options: Namespace) -> int:
    """Print the log as it is written."""
    from training_hub.launch.slurm.control import follow

    for text in follow(options.run, options.rank, to_the_end=options.follow):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def add_cancel_options(parser: ArgumentParser) -> None:
    add_run_option(parser)
    parser.add_argument(
        "--wait",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long the run may take to save before it is ended all the same; 0: end it at once (default: 120)",
    )


def cancel(options: Namespace) -> int:
    """End the job, after its run has saved."""
    from training_hub.launch.slurm.control import cancel as end

    end(options.run, wait_seconds=options.wait, say=print)
    return 0
