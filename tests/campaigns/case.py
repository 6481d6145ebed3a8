"""What one injected fault led to, and tables of many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

AS_WANTED, NOT_WANTED, SILENT = "as wanted", "not as wanted", "silent"


@dataclass(frozen=True)
class Case:
    """One fault. `happened` is empty where everything was as wanted; `is_silent`: wrong numbers, and nothing said."""

    family: str
    fault: str
    wanted: str
    happened: str = ""
    is_silent: bool = False

    @property
    def verdict(self) -> str:
        if not self.happened:
            return AS_WANTED
        return SILENT if self.is_silent else NOT_WANTED


def table(cases: Iterable[Case], seconds: dict[str, float]) -> str:
    """One line of Markdown for each family, and their sum."""
    rows: dict[str, list[Case]] = {}
    for case in cases:
        rows.setdefault(case.family, []).append(case)
    lines = ["| family | wanted | cases | as wanted | silent | seconds |", "|---|---|---:|---:|---:|---:|"]
    for family, found in rows.items():
        lines.append(f"| {family} | {found[0].wanted} | {_counts(found)} | {seconds.get(family, 0):.0f} |")
    everything = [case for found in rows.values() for case in found]
    lines.append(f"| **all** | | {_counts(everything)} | {sum(seconds.values()):.0f} |")
    return "\n".join(lines)


def _counts(cases: list[Case]) -> str:
    verdicts = [case.verdict for case in cases]
    return f"{len(cases)} | {verdicts.count(AS_WANTED)} | {verdicts.count(SILENT)}"
