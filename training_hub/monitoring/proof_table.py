"""Proofs as lines for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from training_hub.monitoring.words import printable
from training_hub.types import Proof

MARKS = {"holds": "ok", "fails": "FAIL", "fallback": "slow", "left out": "-"}
HEADER = ("", "proof", "measured", "limit")


def table(proofs: Sequence[Proof]) -> list[str]:
    """One line per proof: mark, name, what was measured, what is allowed; below them what to do where one fails."""
    rows = [HEADER, *((MARKS[each.status], each.name, each.measured, each.limit) for each in proofs)]
    shown = [tuple(printable(cell, 400) for cell in row) for row in rows]
    widths = [min(48, max(len(row[column]) for row in shown)) for column in range(3)]
    lines = ["  ".join((*map(str.ljust, row[:3], widths), row[3])).rstrip() for row in shown]
    told = (each for each in proofs if each.remedy)
    return lines + [printable(f"{each.name}: {each.remedy}") for each in told]


def as_json(proofs: Sequence[Proof], seconds: float) -> dict[str, Any]:
    """The proofs as plain JSON, with whether all hold and how long they took."""
    return {
        "holds": not any(each.status == "fails" for each in proofs),
        "seconds": round(seconds, 3),
        "proofs": [asdict(each) for each in proofs],
    }
