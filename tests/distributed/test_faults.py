"""One of two processes is killed, stopped or hung: the run ends in words, and goes on to an unbroken one's weights.

The run is the real one, with processes started for it; the unbroken one to compare with is done by a crew.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.crew import Crew
from tests.invariants.run import final_weights, recipe
from tests.workers import acting_at, workers
from training_hub.backends import Given
from training_hub.errors import LaunchError
from training_hub.folders import damage
from training_hub.launch import run
from training_hub.types import TrainResult

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
KILLS = int(os.environ.get("TRAINING_HUB_KILLS", "50"))

SETTINGS: dict[str, Any] = {
    "training": {"global_batch_size": 2, "epochs": 2, "preflight": False},
    "checkpoint": {"interval": 1, "keep_last": 2},
    "data": {"validation_fraction": 0.1},
    "comm": {"timeout_seconds": 10},
}


@pytest.fixture(scope="module")
def unbroken(two: Crew, tiny_model_folder: Path, chat_file: Path, tmp_path_factory) -> dict[str, torch.Tensor]:
    ended = two.train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("runs") / "unbroken", **SETTINGS)
    return load_file(Path(ended[0]["model_path"]) / "model.safetensors")


def whole(output: Path) -> None:
    """Nothing is left half written, and no worker is left."""
    folders = list((output / "checkpoints").glob("step-*"))
    assert folders and not [line for folder in folders for line in damage(folder)]
    assert not workers()


def same(weights: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == other.keys() and all(torch.equal(weights[name], other[name]) for name in weights)


def test_a_rank_that_is_killed_ends_the_run_which_then_goes_on_to_the_same_bits(
    two, unbroken, tiny_model_folder, chat_file, tmp_path
):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", processes={"procs": 2}, **SETTINGS)
    third = tmp_path / "run" / "checkpoints" / "step-3"
    with acting_at(third, lambda: os.kill(workers()[1], signal.SIGKILL)), pytest.raises(LaunchError) as caught:
        run(asked)
    assert "rank 1 of 2" in (said := str(caught.value)) and "was killed by SIGKILL" in said
    assert "rank 1 was last at step " in said and "The newest checkpoint is step-" in said
    whole(tmp_path / "run")
    resumed = two.train(tiny_model_folder, chat_file, tmp_path / "run", **SETTINGS)
    assert same(load_file(Path(resumed[0]["model_path"]) / "model.safetensors"), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run_with_the_stacks_of_all(rank, tiny_model_folder, chat_file, tmp_path):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", processes={"procs": 2}, **SETTINGS)
    third = tmp_path / "run" / "checkpoints" / "step-3"
    with acting_at(third, lambda: os.kill(workers()[rank], signal.SIGSTOP)), pytest.raises(LaunchError) as caught:
        run(asked)
    assert f"rank {rank} of 2" in (said := str(caught.value)) and "did not end when another had failed" in said
    # Rank 0 keeps the list of who is where: without it the others know only where they are themselves.
    assert ("waited for " in said) if rank == 0 else ("rank 1 was last at step " in said)
    whole(tmp_path / "run")
    for one in (0, 1):
        assert "most recent call first" in (tmp_path / "run" / "logs" / f"rank{one}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism",
    [{"data_parallel_shard_degree": -1}, {"pipeline_parallel_degree": 2}],
    ids=["slices", "stages"],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_holds_a_part_of_the_model_and_is_lost_ends_the_run(
    number, parallelism, two, tiny_model_folder, chat_file, tmp_path
):
    divided = {**SETTINGS, "parallelism": parallelism}
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", processes={"procs": 2}, **divided)
    third = tmp_path / "run" / "checkpoints" / "step-3"
    with acting_at(third, lambda: os.kill(workers()[1], number)), pytest.raises(LaunchError) as caught:
        run(asked)
    assert "rank 1 of 2" in (said := str(caught.value)) and "rank 1 was last at step " in said
    whole(tmp_path / "run")
    resumed = two.train(tiny_model_folder, chat_file, tmp_path / "run", **divided)
    assert [each.get("status") for each in resumed] == ["finished"] * 2, resumed
    assert [row["step"] for row in resumed[0]["history"]] == list(range(1, len(resumed[0]["history"]) + 1))


@pytest.mark.slow
def test_random_kills_all_end_in_the_same_bits(unbroken, tiny_model_folder, chat_file, tmp_path):
    """A run is started again and again, and one of its processes killed at a random time, until it gets to its end."""
    draw, killed, number = Random(0), 0, 0
    while killed < KILLS:
        number += 1
        asked = recipe(tiny_model_folder, chat_file, tmp_path / f"run-{number}", processes={"procs": 2}, **SETTINGS)
        killed += killed_until_finished(asked, draw, unbroken)


def killed_until_finished(asked: Any, draw: Random, unbroken: dict[str, torch.Tensor]) -> int:
    """How many kills the run survived; its final weights are those of the unbroken one."""
    for kills in range(1000):
        over = threading.Event()
        thread = threading.Thread(target=kill_one, args=(draw, over, Path(asked.output)), daemon=True)
        thread.start()
        result: TrainResult | None = None
        try:
            result = run(asked, Given())
        except LaunchError as error:
            said = str(error)
        over.set()
        thread.join()
        if result is not None:
            assert same(final_weights(result), unbroken)
            return kills
        assert "was killed by SIGKILL" in said
        assert not workers()
    raise AssertionError("it never got to its end")


def kill_one(draw: Random, over: threading.Event, output: Path) -> None:
    """Kill a random worker at a random time after the run has begun to train; in half of the cases, before that."""
    rank, early, later = draw.randrange(2), draw.uniform(0, 8), draw.uniform(0, 3)
    before = metrics_size(output)
    if draw.random() < 0.5:
        over.wait(early)
    else:
        while not over.wait(0.01) and metrics_size(output) <= before:
            pass
        over.wait(later)
    found = workers()
    if not over.is_set() and rank in found:
        os.kill(found[rank], signal.SIGKILL)


def metrics_size(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.stat().st_size if file.exists() else 0
