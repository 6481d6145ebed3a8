"""Work on chunks in several processes: the results and their order are those of one process, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.moments import PATIENCE_SECONDS, until
from training_hub.data.workers import Workers, can_fork
from training_hub.errors import DataError

pytestmark = pytest.mark.skipif(not can_fork(), reason="this system cannot fork")


def square_slowly_at_first(number: int) -> int:
    time.sleep(0.05 if number < 3 else 0.0)
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse_three(number: int) -> int:
    if number == 3:
        raise DataError(["one", "two"])
    return number


def large(number: int) -> bytes:
    return bytes([number % 256]) * 3_000_000


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks_however_long_each_takes(count: int) -> None:
    with Workers(square_slowly_at_first, count) as workers:
        assert list(workers.map(range(20))) == [number * number for number in range(20)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do_and_not_a_hang(count: int) -> None:
    with (
        pytest.raises(DataError, match=r"exit code -9.* with 3 before.*data\.workers: 0"),
        Workers(die_at_three, count) as workers,
    ):
        list(workers.map(range(20)))


def test_a_worker_that_is_killed_within_a_result_is_the_same_error() -> None:
    """The result is larger than what a pipe holds, so that a part of it is never sent."""

    def tasks(workers: Workers[int, bytes]) -> Iterator[int]:
        yield 0
        assert workers._results[0].poll(PATIENCE_SECONDS)
        workers._processes[0].kill()
        yield 1

    with (
        pytest.raises(DataError, match=r"exit code -9.* with 0 before.*data\.workers: 0"),
        Workers(large, 1) as workers,
    ):
        list(workers.map(tasks(workers)))


def test_an_error_of_the_work_is_raised_in_the_caller_with_all_its_problems() -> None:
    with pytest.raises(DataError) as caught, Workers(refuse_three, 2) as workers:
        list(workers.map(range(20)))
    assert caught.value.problems == ["one", "two"]


def test_tasks_and_results_larger_than_a_pipe_pass_both_ways_at_once() -> None:
    with Workers(len, 2) as workers:
        assert list(workers.map(large(number) for number in range(8))) == [3_000_000] * 8
    with Workers(large, 2) as workers:
        assert sum(len(result) for result in workers.map(range(8))) == 24_000_000


def test_tasks_are_drawn_only_as_they_are_needed() -> None:
    drawn = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    with Workers(square_slowly_at_first, 2) as workers:
        results = workers.map(tasks())
        assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(drawn) <= 10


SLOW = """
import sys, time
from training_hub.data.workers import Workers
def nap(number):
    time.sleep(0.2)
    return number
with Workers(nap, 2) as workers:
    print(*(process.pid for process in workers._processes), flush=True)
    for result in workers.map(range(10_000)):  # longer than a test waits
        pass
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_caller_that_is_interrupted_or_killed(sent: signal.Signals) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert caller.stdout is not None
    workers = [int(word) for word in caller.stdout.readline().split()]
    caller.stdout.close()
    assert len(workers) == 2
    caller.send_signal(sent)
    assert caller.wait(timeout=PATIENCE_SECONDS) != 0
    until(lambda: not any(is_running(pid) for pid in workers))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
