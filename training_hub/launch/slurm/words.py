"""How a job stands, in words: why it waits, how far the run has come, how it ended and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training_hub.launch.endings import read_ending
from training_hub.launch.slurm.client import JobState
from training_hub.monitoring.jsonl import read_metrics
from training_hub.monitoring.words import amount
from training_hub.recipe.folder import RunFolder

WAITS = MappingProxyType(
    {
        "Priority": "jobs of a higher priority come first",
        "Resources": "what it asks for is in use by other jobs",
        "BeginTime": "it may not begin yet; after being requeued a job rests for about two minutes",
        "Dependency": "a job that it depends on has not ended",
        "DependencyNeverSatisfied": "a job that it depends on ended in another way than it needs; cancel it",
        "JobHeldUser": "it is held; scontrol release lets it go",
        "JobHeldAdmin": "an administrator holds it",
        "ReqNodeNotAvail": "a node that it asks for is down or reserved",
        "PartitionDown": "its partition is closed",
        "PartitionInactive": "its partition is closed",
        "PartitionNodeLimit": "it asks for more nodes, or more of a node, than its partition has",
        "PartitionTimeLimit": "it asks for more time than its partition allows; submit it with a smaller --time",
        "QOSMaxJobsPerUserLimit": "you have as many jobs as your QOS allows",
        "QOSMaxGRESPerUser": "you have as many GPUs as your QOS allows",
        "QOSGrpNodeLimit": "the nodes of its QOS are in use",
        "AssocGrpGRES": "the GPUs of your account are in use",
        "AssocGrpNodeLimit": "the nodes of your account are in use",
        "AssocMaxJobsLimit": "your account has as many jobs as it may",
        "AssocGrpCPUMinutesLimit": "your account has used up its time",
        "InvalidAccount": "its account is not known; submit it with another --account",
        "InvalidQOS": "its QOS is not known; submit it with another --qos",
        "Licenses": "a licence that it needs is in use",
        "NodeDown": "a node that it needs is down",
        "BadConstraints": "no node can be what it asks for; look at its --sbatch options",
        "Reservation": "its reservation has not begun",
    }
)
"""Reasons of Slurm's for waiting, by its own names for them."""

ENDS = MappingProxyType(
    {
        "COMPLETED": "ended",
        "FAILED": "failed",
        "CANCELLED": "was cancelled",
        "TIMEOUT": "was ended by Slurm: its time was up (--time)",
        "OUT_OF_MEMORY": "was ended by Slurm: it took more memory than it had asked for (--memory)",
        "NODE_FAIL": "ended because a node failed",
        "PREEMPTED": "gave way to a job of a higher priority",
        "BOOT_FAIL": "did not begin: a node did not start",
        "DEADLINE": "was ended by Slurm: its deadline had come",
    }
)


def sentences(job: JobState | None, name: str, folder: Path | None) -> Iterator[str]:
    """How the job stands, then what the run says of itself. name: the job's number; folder: of its run, where known."""
    yield f"job {name} {_state(job)}"
    if folder is not None:
        yield from _run(RunFolder(folder), is_running=job is not None and job.state == "RUNNING")


def _state(job: JobState | None) -> str:
    if job is None:
        return "is no longer known to Slurm"
    if job.state == "PENDING":
        why = WAITS.get(job.reason.partition(",")[0], "")
        begins = f"; expected to begin at {job.start}" if job.start not in ("", "N/A", "Unknown") else ""
        return f"is waiting: {why or 'for a reason that Slurm calls'} ({job.reason or 'no reason given'}){begins}"
    if job.state == "RUNNING":
        return f"is running on {job.nodes}, for {job.used} of {job.limit.replace('UNLIMITED', 'any time')}"
    if not job.is_over:
        return f"is {job.state.lower().replace('_', ' ')}"
    return ENDS.get(job.state, f"ended as {job.state}")


def _run(folder: RunFolder, is_running: bool) -> Iterator[str]:
    if progress := _progress(folder):
        yield progress
    result = folder.earlier_result() or {}
    status = result.get("status")
    if status in ("finished", "stopped"):
        yield f"the run {status}: {result.get('reason') or 'model in ' + str(result.get('model_path'))}"
    elif status in ("failed", "interrupted") and not is_running:
        yield f"the run was {status}:" if status == "interrupted" else "the run failed:"
        yield from (f"  {line}" for line in _causes(folder, result))
    elif status == "running" and not is_running:
        newest = folder.newest_checkpoint()
        kept = f"its newest checkpoint is {newest}" if newest else "it had saved nothing"
        yield f"the run was ended without a word; {kept}"


def _progress(folder: RunFolder) -> str:
    """The last step that the metrics tell of; "" before the first."""
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    last: dict[str, Any] = rows[-1] if rows else {}
    if not last.get("step"):
        return ""
    total = json.loads(folder.plan.read_text(encoding="utf-8"))["total_steps"] if folder.plan.is_file() else None
    of = f" of {total:,}" if total else ""
    loss = f", loss {last['loss']:.4g}" if last.get("loss") is not None else ""
    rate = f", {amount(round(last['tokens_per_second']))} tokens per second" if last.get("tokens_per_second") else ""
    return f"step {last['step']:,}{of}{loss}{rate}"


def _causes(folder: RunFolder, result: dict[str, Any]) -> list[str]:
    """What ended the run: the first error of its own that a process of any node raised, else what the first says."""
    ranks = sorted(int(path.stem[4:]) for path in (folder.path / "logs").glob("rank*.json") if path.stem[4:].isdigit())
    found = [ending for rank in ranks if (ending := read_ending(folder.path, rank)) is not None and ending.type]
    own = sorted((ending for ending in found if not ending.is_echo), key=lambda one: one.time)
    told = [str(problem) for problem in result.get("problems", [])]
    if result.get("error") != "LaunchError" or not own:
        return told
    return [f"rank {own[0].rank}: {own[0].type}: {problem}" for problem in own[0].problems] + told
