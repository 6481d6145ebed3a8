"""What Slurm's own commands are asked, and how their answers are read.

Tables in a format of our own (`squeue --format`), not JSON, whose shape changes from version to version.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from training_hub.errors import LaunchError

SQUEUE_FORMAT = "%i|%T|%r|%S|%M|%l|%N"
SACCT_FORMAT = "JobID,State,Reason,Start,Elapsed,Timelimit,NodeList"
LIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)
"""States of a job that is not over."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job. state: in its own words. reason: why it waits, or why it ended. used, limit: time."""

    job: str
    state: str
    reason: str = ""
    start: str = ""
    used: str = ""
    limit: str = ""
    nodes: str = ""

    @property
    def is_over(self) -> bool:
        return self.state not in LIVE


def ask(*words: str) -> str:
    """What a command of Slurm answers. Raises LaunchError in its own words where it refuses, or is not there."""
    try:
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(
            f"Slurm is not installed here: there is no command {words[0]}. Run this on a machine from which jobs are "
            "submitted."
        ) from None
    if ended.returncode != 0:
        said = " ".join(ended.stderr.split()) or f"code {ended.returncode}"
        raise LaunchError(f"Slurm refused `{words[0]}`: {said}")
    return ended.stdout


def send(script: str) -> str:
    """Submit the script; the number of the job."""
    return ask("sbatch", "--parsable", script).strip().partition(";")[0]


def state_of(job: str) -> JobState | None:
    """What Slurm knows of the job, in its queue or in its accounts; None where it has forgotten it."""
    try:
        found = read_state(ask("squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={SQUEUE_FORMAT}"))
    except LaunchError as error:
        if "Invalid job id" not in str(error):
            raise
        found = None
    if found is not None:
        return found
    try:
        return read_state(
            ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", f"--format={SACCT_FORMAT}")
        )
    except LaunchError:  # a cluster without accounts: then the run folder is all there is
        return None


def read_state(table: str) -> JobState | None:
    """The first line of a table in either format; None where it is empty."""
    line = next((line for line in table.splitlines() if line.strip()), None)
    if line is None:
        return None
    job, state, reason, start, used, limit, nodes = (line.split("|") + [""] * 7)[:7]
    # sacct writes `CANCELLED by 1000`, and a reason only where there is one.
    state, _, by = state.strip().partition(" ")
    reason = "" if reason in ("None", "") else reason
    return JobState(job, state, reason or by, start, used, limit, nodes if not nodes.startswith("(") else "")


def script_of(job: str) -> str | None:
    """The batch script that the job was submitted with; None where Slurm has forgotten it."""
    try:
        return read_script(ask("scontrol", "--oneliner", "show", "job", job))
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def read_script(line: str) -> str | None:
    """The command in what `scontrol --oneliner show job` says."""
    match = re.search(r" Command=(.*?)(?= WorkDir=|$)", line)
    return match[1] if match and match[1] != "(null)" else None
