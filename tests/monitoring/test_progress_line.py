from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console as RichConsole

from training_hub.monitoring.console import LineConsole, TerminalConsole, open_console
from training_hub.monitoring.progress_line import LiveStep, StepLines, step_line, step_watcher


def steps_said(stream: io.StringIO) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+)/", stream.getvalue(), flags=re.MULTILINE)]


def test_a_plain_line_has_all_numbers_of_the_step(report):
    assert step_line(report()) == (
        "step 1/1000  epoch 0.01  loss 3.2450  lr 1.00e-05  grad norm 1.25  12.3k tokens/s (3,103 trained)  1.50 GiB"
        "  1:02:03 left"
    )
    assert "left" not in step_line(report(step=1000))
    assert "loss nan (skipped)" in step_line(report(loss=math.nan, skipped=True))


def test_fast_steps_give_one_line_a_second_and_the_first_and_the_last(report, clock):
    stream = io.StringIO()
    watch = StepLines(LineConsole(stream), clock=clock)
    for step in range(1, 26):
        watch(report(step=step, total_steps=25))
        clock.now += 0.125
    watch.close()
    assert steps_said(stream) == [1, 9, 17, 25]


def test_slow_steps_give_a_line_every_log_interval(report, clock):
    stream = io.StringIO()
    watch = StepLines(LineConsole(stream), interval=10, clock=clock)
    for step in range(1, 26):
        watch(report(step=step, total_steps=25))
        clock.now += 60
    assert steps_said(stream) == [1, 10, 20, 25]


def test_a_run_that_stops_early_still_says_its_last_step(report, clock):
    stream = io.StringIO()
    watch = StepLines(LineConsole(stream), interval=10, clock=clock)
    for step in range(1, 14):
        watch(report(step=step))
        clock.now += 60
    watch.close("interrupted")
    assert steps_said(stream) == [1, 10, 13]


def test_a_resumed_run_says_its_first_step(report, clock):
    stream = io.StringIO()
    StepLines(LineConsole(stream), interval=10, clock=clock)(report(step=503))
    assert steps_said(stream) == [503]


def test_validations_have_their_own_line_at_any_step(report, clock):
    stream = io.StringIO()
    watch = StepLines(LineConsole(stream), interval=1000, clock=clock)
    watch(report(step=0, loss=math.nan, validation_loss=5.0, validation_perplexity=148.4131))
    watch(report())
    watch(report(step=7, validation_loss=2.5, validation_perplexity=12.1825))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "validation at step 0: loss 5.0000, perplexity 148.4",
        "step 1/1000",
        "step 7/1000",
        "validation at step 7: loss 2.5000, perplexity 12.18",
    ]


def test_titan_lines_are_those_of_torchforge_for_every_step(report):
    stream = io.StringIO()
    watch = step_watcher("titan", open_console("titan", stream), 1)
    for step, loss in ((1, 3.245), (2, 3.189), (3, 3.134)):
        watch(report(step=step, loss=loss))
    lines = stream.getvalue().splitlines()
    stamped = r"\[Trainer-0/1\] \d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO "
    assert [re.sub(f"^{stamped}", "", line) for line in lines] == [
        "1 / 1000|Loss: 3.245",
        "2 / 1000|Loss: 3.189",
        "3 / 1000|Loss: 3.134",
    ]
    assert all(re.match(stamped, line) for line in lines)


def test_off_has_no_watcher():
    assert step_watcher("off", open_console("off"), 1) is None


@pytest.mark.parametrize("width", [60, 160])
def test_a_terminal_keeps_one_live_line_and_leaves_the_last_step_behind(report, clock, width):
    stream = io.StringIO()
    console = TerminalConsole(RichConsole(force_terminal=True, file=stream, width=width), clock=clock)
    watch = step_watcher("auto", console, 1)
    assert isinstance(watch, LiveStep)
    for step in range(1, 4):
        clock.now += 1
        watch(report(step=step, total_steps=3))
    live = stream.getvalue()
    assert all(f"step {step}/3" in live for step in (1, 2, 3))
    # Each picture begins by wiping the line before it.
    assert live.count("\x1b[2K") >= 2
    watch.close()
    assert stream.getvalue().count("\x1b[?25h") == 1
    assert stream.getvalue().splitlines()[-1].strip() != ""
    assert "step 3/3" in stream.getvalue()[len(live) :]


def test_a_terminal_shows_validations_above_the_live_line_and_bars_with_it(report, clock):
    stream = io.StringIO()
    console = TerminalConsole(RichConsole(force_terminal=True, file=stream, width=160), clock=clock)
    watch = LiveStep(console)
    watch(report(validation_loss=2.5, validation_perplexity=12.1825))
    with console.progress("saving", total=2, unit="files") as advance:
        clock.now += 1
        advance(1)
        picture = stream.getvalue()[stream.getvalue().rindex("saving") :]
        assert "step 1/1000" in picture
    watch.close()
    assert "validation at step 1: loss 2.5000, perplexity 12.18\n" in stream.getvalue()
