"""Runs on a real Slurm of two nodes: preempted, out of time, cancelled or failed, they go on or say why they do not.

A run that was stopped and started again has the losses of one that was not, bit for bit; and those of one process to
1e-6 over its first steps, since float32 sums of some hundred numbers have another order there.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.run import train
from tests.slurm.cluster import Cluster
from training_hub.errors import DataError, LaunchError, RecipeError
from training_hub.folders import damage
from training_hub.frontends.cli import main
from training_hub.launch.slurm import client
from training_hub.launch.slurm.control import follow, status

pytestmark = pytest.mark.slow

CLOSE, FIRST_STEPS = 1e-6, 20
EPOCHS = 20
SETTINGS: dict[str, Any] = {
    "training": {"global_batch_size": 4, "epochs": EPOCHS, "preflight": False},
    "optimizer": {"name": "SGD", "lr": 0.1},
    "checkpoint": {"interval": 200, "minutes": None},
}
Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def unbroken(tiny_model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """The steps of the same run, undisturbed in two processes."""
    settings = {**SETTINGS, "processes": {"procs": 2}}
    result = train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("runs") / "unbroken", **settings)
    return list(result.history)


@pytest.fixture
def words(place: Path, tiny_model_folder: Path, chat_file: Path) -> list[str]:
    """What describes the run on a command line; the data by a relative path."""
    (place / "chat.jsonl").write_bytes(chat_file.read_bytes())
    settings = {f"{name}.{key}": value for name, section in SETTINGS.items() for key, value in section.items()}
    settings |= {"model.dtype": "float32", "training.max_seq_len": 256, "data.cache": False}
    assigned = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    return [f"--model={tiny_model_folder}", "--data=chat.jsonl", "--output=my run's", *assigned]


def submit(words: list[str], *more: str) -> str:
    """Submit on two nodes; the number of the job."""
    assert main(["slurm", "submit", *words, "--nodes=2", *more]) == 0
    return str(json.loads(Path("my run's/slurm/job.json").read_text())["job"])


def step_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if len(lines) > 1 else 0


def at_step(cluster: Cluster, step: int) -> None:
    cluster.until(lambda: step_of(Path("my run's")) >= step, f"step {step}", 300)


def over(cluster: Cluster, job: str, seconds: float = 600) -> str:
    """Wait for the end of the job; the state that it ended in."""
    states: list[str] = []

    def is_over() -> bool:
        state = client.state_of(job)
        assert state is not None
        states.append(state.state)
        return state.is_over

    log = Path("my run's/slurm") / f"job-{job}.log"
    try:
        cluster.until(is_over, f"the end of job {job}", seconds)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log.read_text() if log.exists() else 'no log'}") from None
    return states[-1]


def same_steps(folder: Path, wanted: Steps) -> None:
    """The run has each step once, in order, with the numbers of the other."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "samples", "loss", "grad_norm")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in wanted]
    assert not damage(folder / "final")


def test_two_nodes_find_the_losses_of_one_and_the_log_can_be_followed(cluster, words, unbroken, capsys):
    job = submit(words, "--time=10", "--memory=900M", "--sbatch=--comment=it's a #test")
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(follow("my run's")), daemon=True)
    reader.start()
    assert over(cluster, job) == "COMPLETED"
    same_steps(Path("my run's"), unbroken)
    reader.join(60)
    assert not reader.is_alive(), "the log ends with the job"
    assert "".join(said).count("finished: model in my run's/final") == 1, "one node speaks"
    text = "\n".join(status("my run's"))
    assert f"job {job} ended" in text and f"step {len(unbroken):,} of {len(unbroken):,}" in text
    assert "the run finished: model in" in text and status(job) == status("my run's"), "by folder and by number"
    logs = {path.name for path in Path("my run's/logs").glob("*.log")}
    assert logs == {"rank0.log", "rank1.log"}, "a process on each node"
    capsys.readouterr()
    assert main(["slurm", "submit", *words, "--nodes=2"]) == 0
    assert "already finished" in capsys.readouterr().out


def test_its_first_steps_are_those_of_one_process(cluster, unbroken, tiny_model_folder, chat_file, tmp_path):
    alone = train(tiny_model_folder, chat_file, tmp_path / "alone", **SETTINGS)
    for row, other in zip(alone.history[:FIRST_STEPS], unbroken[:FIRST_STEPS], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=CLOSE)


def test_a_preempted_run_saves_is_requeued_and_goes_on_to_the_same_losses(cluster, words, unbroken):
    job = submit(words)
    at_step(cluster, 20)
    urgent = cluster.ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 3"
    )
    cluster.until(lambda: client.state_of(job).state == "PENDING", "the run to give way", 120)  # type: ignore[union-attr]
    stopped_at = step_of(Path("my run's"))
    assert 20 <= stopped_at < len(unbroken)
    result = json.loads(Path("my run's/result.json").read_text())
    assert (
        result["status"] == "interrupted"
        and f"SIGTERM received: stopped after step {stopped_at} " in result["problems"][0]
    )
    assert not damage(Path("my run's/checkpoints") / f"step-{stopped_at}"), "saved at the step it had come to"
    assert f"job {job} is waiting: " in "\n".join(status("my run's"))
    assert over(cluster, job) == "COMPLETED"
    cluster.until(lambda: client.state_of(urgent).is_over, "the urgent job")  # type: ignore[union-attr]
    same_steps(Path("my run's"), unbroken)
    assert f"resume: going on after step {stopped_at} " in Path(f"my run's/slurm/job-{job}.log").read_text()


def test_the_signal_before_a_time_limit_does_the_same(cluster, words, unbroken):
    """What Slurm does at the time of --signal=B:...: a signal to the batch script alone."""
    job = submit(words)
    at_step(cluster, 20)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    cluster.until(
        lambda: "goes on when Slurm starts" in Path(f"my run's/slurm/job-{job}.log").read_text(), "a requeue", 120
    )
    assert over(cluster, job) == "COMPLETED"
    same_steps(Path("my run's"), unbroken)


def test_a_run_that_is_cancelled_saves_first_and_is_not_started_again(cluster, words, unbroken, capsys):
    job = submit(words)
    with pytest.raises(LaunchError, match=f"is the folder of job {job}, which is"):
        main_raising(["slurm", "submit", *words, "--nodes=2"])
    at_step(cluster, 20)
    capsys.readouterr()
    assert main(["slurm", "cancel", "my run's"]) == 0
    assert f"job {job} has ended" in capsys.readouterr().out
    text = "\n".join(status("my run's"))
    assert "the run was interrupted:\n  SIGINT received: stopped after step" in text
    stopped_at = step_of(Path("my run's"))
    assert not damage(Path("my run's/checkpoints") / f"step-{stopped_at}")
    again = submit(words)
    assert again != job and over(cluster, again) == "COMPLETED"
    same_steps(Path("my run's"), unbroken)


def test_a_waiting_job_says_why_and_is_cancelled_at_once(cluster, words, capsys):
    blocker = cluster.ask("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=sleep 60")
    cluster.until(lambda: client.state_of(blocker).state == "RUNNING", "the other job")  # type: ignore[union-attr]
    job = submit(words, "--job-name=waits")
    cluster.until(lambda: client.state_of(job).reason in ("Resources", "Priority"), "a reason")  # type: ignore[union-attr]
    capsys.readouterr()
    assert main(["slurm", "status", "my run's"]) == 0
    assert f"job {job} is waiting: " in capsys.readouterr().out
    assert main(["slurm", "cancel", job]) == 0
    assert over(cluster, job) == "CANCELLED"
    cluster.ask("scancel", blocker)
    cluster.until(lambda: not cluster.ask("squeue", "--noheader"), "an empty queue", 120)


def test_a_run_that_fails_says_why(cluster, words):
    rows = [{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x " * 400}]}] * 8
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = submit(words)
    assert over(cluster, job) == "FAILED"
    text = "\n".join(status("my run's"))
    assert f"job {job} failed" in text and "the run failed:" in text
    assert "chat.jsonl line 1: " in text


def main_raising(words: list[str]) -> int:
    """The command line, with its errors as they are."""
    return main([*words, "--debug"])


def test_what_a_run_would_refuse_is_refused_before_anything_is_submitted(cluster, words):
    queue = cluster.ask("squeue", "--noheader")
    with pytest.raises(RecipeError, match=r"training\.global_batch_size"):
        main_raising(["slurm", "submit", *words, "--nodes=2", "training.global_batch_size=-1"])
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        main_raising(["slurm", "submit", *words, "--nodes=2", "--data=nowhere.jsonl"])
    with pytest.raises(RecipeError, match="model"):
        main_raising(["slurm", "submit", *words, "--nodes=2", "--model=/no/model"])
    Path("chat.jsonl").write_text('{"messages": [{"role": "judge", "content": "x"}]}\n')
    with pytest.raises(DataError, match="line 1: message 1 has role 'judge'"):
        main_raising(["slurm", "submit", *words, "--nodes=2", "--check-rows"])
    assert cluster.ask("squeue", "--noheader") == queue
    assert not Path("my run's").exists()


def test_what_slurm_refuses_is_said_in_its_words(cluster, words):
    with pytest.raises(LaunchError, match=r"Slurm refused `sbatch`: .*invalid partition specified: nowhere"):
        main_raising(["slurm", "submit", *words, "--nodes=2", "--partition=nowhere"])
    with pytest.raises(RecipeError, match="pyxis is not installed"):
        main_raising(["slurm", "submit", *words, "--nodes=2", "--container=image"])
