"""How a job stands is said in words, from what Slurm's commands print and from what lies in the run folder.

The tables were printed by Slurm 22.05.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training_hub.errors import DataError, LaunchError, RecipeError
from training_hub.launch import failure
from training_hub.launch.endings import leave_error
from training_hub.launch.slurm.client import JobState, ask, read_script, read_state
from training_hub.launch.slurm.control import find
from training_hub.launch.slurm.words import sentences


def said(job: JobState | None, folder: Path | None = None) -> str:
    return "\n".join(sentences(job, "7", folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def step(folder: Path, number: int) -> None:
    row = {"step": number, "loss": 1.25, "tokens_per_second": 12345.6}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps(row) + "\n")
    (folder / "plan.json").write_text(json.dumps({"total_steps": 1000}))


def test_a_table_of_squeue_is_read():
    table = "7|PENDING|Priority|2026-11-27T18:00:00|0:00|10:00|\n8|RUNNING|None|N/A|1:00|10:00|n1\n"
    assert read_state(table) == JobState("7", "PENDING", "Priority", "2026-11-27T18:00:00", "0:00", "10:00")
    assert read_state("7|RUNNING|None|2026-11-27T12:00:00|3:05|UNLIMITED|n[1-2]\n").nodes == "n[1-2]"  # type: ignore[union-attr]
    assert read_state("\n") is None


def test_a_table_of_sacct_is_read():
    found = read_state("7|CANCELLED by 1000|None|2026-11-27T12:00:00|00:03:05|00:10:00|n[1-2]\n")
    assert found is not None and (found.state, found.reason, found.is_over) == ("CANCELLED", "by 1000", True)


def test_the_script_of_a_job_is_read_whatever_its_path():
    line = "JobId=7 JobName=x Command=/runs/my model's/slurm/job.sh WorkDir=/home/u StdErr=/a/b Power="
    assert read_script(line) == "/runs/my model's/slurm/job.sh"
    assert read_script("JobId=7 Command=(null) WorkDir=/home/u") is None


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "jobs of a higher priority come first"),
        ("Resources", "what it asks for is in use"),
        ("BeginTime", "rests for about two minutes"),
        ("QOSMaxJobsPerUserLimit", "as many jobs as your QOS allows"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "down or reserved"),
        ("SomethingNew", "for a reason that Slurm calls (SomethingNew)"),
    ],
)
def test_a_waiting_job_says_why(reason: str, words: str):
    assert words in said(JobState("7", "PENDING", reason))


def test_a_waiting_job_says_when_it_is_expected_to_begin():
    assert "expected to begin at 18:00" in said(JobState("7", "PENDING", "Priority", "18:00"))
    assert "expected" not in said(JobState("7", "PENDING", "Priority", "N/A"))


def test_a_running_job_says_where_and_which_step_it_is_at(folder: Path):
    step(folder, 120)
    text = said(JobState("7", "RUNNING", used="3:05", limit="1-00:00:00", nodes="n[1-2]"), folder)
    assert "is running on n[1-2], for 3:05 of 1-00:00:00" in text
    assert "step 120 of 1,000, loss 1.25, 12,346 tokens per second" in text


def test_a_finished_run_says_where_its_model_is(folder: Path):
    (folder / "result.json").write_text(json.dumps({"status": "finished", "model_path": "/o/final"}))
    assert "job 7 ended\nthe run finished: model in /o/final" in said(JobState("7", "COMPLETED"), folder)
    assert "no longer known to Slurm\nthe run finished" in said(None, folder)


def test_a_failed_run_says_the_error_of_the_process_that_failed_first_on_any_node(folder: Path):
    leave_error(folder, 5, DataError("row 3: no answer"))
    leave_error(folder, 0, LaunchError("lost the others"))
    lost = LaunchError("lost the others")
    (folder / "result.json").write_text(json.dumps(failure(lost)))
    text = said(JobState("7", "FAILED"), folder)
    assert text.index("rank 5: DataError: row 3: no answer") < text.index("lost the others")


def test_an_interrupted_run_says_so_once_it_does_not_run_again(folder: Path):
    result = {"status": "interrupted", "problems": ["SIGTERM received: stopped after step 3"]}
    (folder / "result.json").write_text(json.dumps(result))
    assert "SIGTERM received" in said(JobState("7", "PENDING", "BeginTime"), folder)
    assert "SIGTERM" not in said(JobState("7", "RUNNING"), folder)


def test_a_run_that_could_say_nothing_is_said_to_have_been_ended(folder: Path):
    (folder / "result.json").write_text(json.dumps({"status": "running"}))
    (folder / "checkpoints" / "step-40").mkdir(parents=True)
    text = said(JobState("7", "OUT_OF_MEMORY"), folder)
    assert "more memory than it had asked for" in text and "its newest checkpoint is step-40" in text


def test_a_run_is_found_by_its_folder_and_anything_else_is_refused(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text(json.dumps({"job": "41"}))
    assert (find(str(tmp_path)).job, find(str(tmp_path)).folder) == ("41", tmp_path)
    with pytest.raises(RecipeError, match="neither the number of a job nor the folder of a run"):
        find(str(tmp_path / "slurm"))


def test_a_command_that_is_not_there_is_said_in_words():
    with pytest.raises(LaunchError, match="Slurm is not installed here: there is no command no-such-command"):
        ask("no-such-command")


def test_what_a_command_refuses_is_told_in_its_own_words():
    with pytest.raises(LaunchError, match=r"Slurm refused `ls`: .*no-such-file"):
        ask("ls", "/no-such-file")
