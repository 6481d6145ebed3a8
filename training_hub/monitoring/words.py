"""How amounts, durations and text from data are written for people."""

from __future__ import annotations

import math
import unicodedata

LONGEST_LINE = 2048
"""Bytes of one shown line; a longer one is cut and says by how much."""

# Order marks make a terminal show text in another order than it is in; line and paragraph separators break a line.
_HARMFUL = frozenset(map(chr, (0x2028, 0x2029, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def _is_harmful(character: str) -> bool:
    return character != "\t" and (character in _HARMFUL or unicodedata.category(character) in ("Cc", "Cs"))


def printable(text: str, longest: int = LONGEST_LINE) -> str:
    """`text` as one line that is safe to show: control characters escaped, at most `longest` bytes of UTF-8 kept."""
    # No character is shorter than a byte: what lies beyond `longest` characters need not be looked at.
    shown = "".join(
        ascii(character)[1:-1] if _is_harmful(character) else character for character in text[: longest + 1]
    )
    size = len(shown.encode("utf-8"))
    if size <= longest and len(text) <= longest:
        return shown
    kept = shown.encode("utf-8")[:longest].decode("utf-8", errors="ignore")
    return f"{kept} … (cut here: {len(text):,} characters)"


def duration(seconds: float) -> str:
    """`seconds` for people: '4.2 s', '3:07', '2:03:10', '1 day 2:03:10'; '?' where it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}:{rest:02d}"
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}"
    return clock if not days else f"{days} day{'s' * (days > 1)} {clock}"


def amount(number: float) -> str:
    """A count for people: '1,234', '0.5'."""
    return f"{number:,.0f}" if number == int(number) or number >= 100 else f"{number:,.1f}"


def rate(per_second: float) -> str:
    """A rate for people: '0.52', '340', '12.3k', '1.20M'."""
    if not math.isfinite(per_second):
        return "?"
    for limit, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if per_second >= limit:
            return f"{per_second / divisor:.{2 if suffix == 'M' else 1}f}{suffix}"
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"
