from __future__ import annotations

import math
import subprocess
import sys

import pytest

from training_hub.monitoring.throughput import ThroughputMeter, memory_gib


def test_speed_is_of_the_last_steps_only():
    meter = ThroughputMeter(10, window=2)
    for tokens, seconds in ((100, 50.0), (100, 1.0), (300, 1.0), (500, 1.0)):
        meter.add(tokens, seconds)
    assert meter.tokens_per_second == 400
    assert meter.seconds_left == 6


def test_the_first_step_counts_only_until_there_is_another():
    meter = ThroughputMeter(12)
    meter.add(100, 50.0)
    assert meter.tokens_per_second == 2
    meter.add(100, 1.0)
    assert meter.tokens_per_second == 100
    assert meter.seconds_left == 10


def test_steps_done_before_a_resume_shorten_the_time_left_and_say_nothing_of_speed():
    meter = ThroughputMeter(1000, first_step=900)
    meter.add(10, 2.0)
    assert meter.seconds_left == 198


def test_before_the_first_step_nothing_is_known():
    meter = ThroughputMeter(10)
    assert meter.tokens_per_second == 0.0
    assert math.isnan(meter.seconds_left)


def test_time_left_is_never_negative():
    meter = ThroughputMeter(10, first_step=10)
    meter.add(10, 2.0)
    assert meter.seconds_left == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak through getrusage")
def test_memory_is_the_peak_in_gib_even_after_it_was_given_back():
    code = (
        "from training_hub.monitoring.throughput import memory_gib\n"
        "before = memory_gib(); block = bytearray(b'x') * 2**28; del block; print(before, memory_gib())"
    )
    before, after = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 0.001 < before < 1
    assert 0.2 < after - before < 0.4
    assert memory_gib() > 0.001
