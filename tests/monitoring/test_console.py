from __future__ import annotations

import io
import os
import re
import sys

import pytest
from rich.console import Console as RichConsole

from training_hub.errors import RecipeError
from training_hub.monitoring.console import LineConsole, TerminalConsole, open_console, titan_prefix


def terminal(clock) -> tuple[TerminalConsole, io.StringIO]:
    stream = io.StringIO()
    return TerminalConsole(RichConsole(force_terminal=True, file=stream, width=120), clock=clock), stream


def seen(stream: io.StringIO) -> str:
    """What was written, without the codes that move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_stream_that_is_no_terminal_gets_plain_lines():
    stream = io.StringIO()
    console = open_console("auto", stream)
    console.say("loading [bold]model[/bold]")
    with console.progress("tokenising", total=3) as advance:
        advance(3)
    assert stream.getvalue() == "loading [bold]model[/bold]\n"


def test_the_rich_style_is_live_even_into_a_file():
    stream = io.StringIO()
    console = open_console("rich", stream)
    console.say("a [b]c[/b]")
    with console.progress("tokenising", total=3) as advance:
        advance(1)
    assert "a [b]c[/b]" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


def test_plain_progress_says_a_line_after_two_seconds_then_every_five_and_a_last_one(clock):
    stream = io.StringIO()
    console = LineConsole(stream, clock=clock)
    with console.progress("tokenising", total=1000, unit="rows") as advance:
        for _ in range(10):
            clock.now += 1
            advance(100)
    assert stream.getvalue().splitlines() == [
        "tokenising: 200 of 1,000 rows (20%), 100 rows/s, 8.0 s left",
        "tokenising: 700 of 1,000 rows (70%), 100 rows/s, 3.0 s left",
        "tokenising: 1,000 rows in 10 s (100 rows/s)",
    ]


def test_progress_without_a_known_end_says_how_long_it_has_taken(clock):
    stream = io.StringIO()
    with LineConsole(stream, clock=clock).progress("reading", unit="files") as advance:
        clock.now += 4
        advance(2)
    assert stream.getvalue().splitlines()[0] == "reading: 2 files, 0.50 files/s, 4.0 s so far"


def test_work_that_fails_says_where_it_stopped_and_the_error_passes(clock):
    stream = io.StringIO()

    def read() -> None:
        with LineConsole(stream, clock=clock).progress("reading") as advance:
            clock.now += 3
            advance(6)
            raise KeyError("x")

    with pytest.raises(KeyError):
        read()
    assert stream.getvalue().splitlines()[-1] == "reading: stopped after 6 rows in 3.0 s (2.00 rows/s)"


@pytest.mark.parametrize("total", [0, 10])
def test_progress_over_nothing_is_no_error(clock, total):
    console, _ = terminal(clock)
    for one in (console, LineConsole(io.StringIO(), clock=clock)):
        with one.progress("reading", total=total) as advance:
            advance(0)
            clock.now += 10
            advance(0)


def test_a_terminal_shows_a_bar_with_rate_and_time_left_and_takes_it_away(clock):
    console, stream = terminal(clock)
    with console.progress("tokenising", total=400) as advance:
        clock.now += 1
        advance(100)
        assert "100 of 400 rows (25%), 100 rows/s, 3.0 s left" in seen(stream)
        assert "━" in stream.getvalue()
        console.say("a line above the bar")
    assert stream.getvalue().rstrip().endswith("\x1b[2K")
    assert "tokenising: " not in seen(stream)


def test_a_terminal_says_the_sum_of_long_work(clock):
    console, stream = terminal(clock)
    with console.progress("tokenising", total=400) as advance:
        clock.now += 4
        advance(400)
    assert "tokenising: 400 rows in 4.0 s (100 rows/s)\n" in seen(stream)


def test_a_terminal_shows_the_cursor_again_after_an_error(clock):
    console, stream = terminal(clock)
    with pytest.raises(ValueError), console.progress("tokenising"), console.progress("hashing", total=3):
        raise ValueError
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1


def test_a_terminal_is_redrawn_at_most_ten_times_a_second(clock):
    console, stream = terminal(clock)
    with console.progress("tokenising", total=10_000) as advance:
        for _ in range(10_000):
            clock.now += 0.0001
            advance(1)
    assert seen(stream).count("tokenising") < 15


def test_data_cannot_move_the_cursor_or_forge_lines(clock):
    console, stream = terminal(clock)
    plain = io.StringIO()
    for one in (console, LineConsole(plain)):
        one.say("row \x1b[2Jgone\nINFO all is well")
    assert r"row \x1b[2Jgone\nINFO all is well" in stream.getvalue()
    assert plain.getvalue() == "row \\x1b[2Jgone\\nINFO all is well\n"


def test_titan_lines_open_with_rank_world_size_and_local_time():
    assert re.fullmatch(r"\[Trainer-0/8\] \d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO ", titan_prefix(0, 8))
    stream = io.StringIO()
    open_console("titan", stream).say("Loading")
    assert re.fullmatch(r"\[Trainer-0/1\] \S+ \S+ INFO Loading\n", stream.getvalue())


def test_off_prints_nothing():
    stream = io.StringIO()
    console = open_console("off", stream)
    console.say("x")
    with console.progress("y") as advance:
        advance(1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("style", ["auto", "plain", "rich", "titan"])
def test_a_closed_stream_silences_the_console_and_nothing_else(style):
    stream = io.StringIO()
    console = open_console(style, stream)
    console.say("heard")
    stream.close()
    console.say("not heard")
    with console.progress("x", total=2) as advance:
        advance(1)
    open_console(style, stream).say("not heard either")


@pytest.mark.parametrize("style", ["plain", "rich"])
def test_a_pipe_nobody_reads_silences_the_console(style):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    console = open_console(style, stream)
    for _ in range(3):
        console.say("x" * 1000)
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_process_without_standard_output_has_a_console(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    open_console("auto").say("x")


def test_what_the_encoding_cannot_write_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    open_console("plain", stream).say("naïve 文")
    assert raw.getvalue() == rb"na\xefve \u6587" + os.linesep.encode()


def test_an_unknown_style_is_refused():
    with pytest.raises(RecipeError, match=r"monitoring\.console: 'loud'.*auto, rich, plain, titan, off"):
        open_console("loud")
