from __future__ import annotations

import math

import pytest

from training_hub.monitoring.words import LONGEST_LINE, amount, duration, printable, rate


def test_control_characters_are_escaped_and_ordinary_text_is_kept():
    assert printable("a\x1b[31mred\x07\r\nb") == r"a\x1b[31mred\x07\r\nb"
    assert printable("tab\tстрока 文 👩‍👩‍👧 é") == "tab\tстрока 文 👩‍👩‍👧 é"


def test_marks_that_reorder_or_break_a_line_and_lone_surrogates_are_escaped():
    assert printable("a\u202eb\u2028c\ud800d\x9be") == r"a\u202eb\u2028c\ud800d\x9be"


@pytest.mark.parametrize("character", ["x", "é", "文", "\x00"])
def test_a_long_line_is_cut_at_two_kilobytes_and_says_so(character: str):
    shown = printable(character * 100_000)
    kept, _, said = shown.partition(" … ")
    assert LONGEST_LINE - 4 < len(kept.encode()) <= LONGEST_LINE
    assert said == "(cut here: 100,000 characters)"


def test_a_line_of_exactly_two_kilobytes_is_whole():
    assert printable("x" * LONGEST_LINE) == "x" * LONGEST_LINE


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1:00"),
        (187, "3:07"),
        (7390, "2:03:10"),
        (93_790, "1 day 2:03:10"),
        (180_190, "2 days 2:03:10"),
        (math.nan, "?"),
        (math.inf, "?"),
        (-1, "?"),
    ],
)
def test_durations_read_like_a_clock(seconds: float, said: str):
    assert duration(seconds) == said


def test_amounts_and_rates_are_short():
    assert [amount(n) for n in (0, 1234, 0.5, 123.4)] == ["0", "1,234", "0.5", "123"]
    assert [rate(r) for r in (0.523, 340.2, 12_345, 1_200_000, math.inf)] == ["0.52", "340", "12.3k", "1.20M", "?"]
