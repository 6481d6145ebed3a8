"""What the sources of the data are called where numbers are told of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def metric_names(sources: Sequence[str], what: str = "source_loss") -> list[str]:
    """source_loss/NAME, or another `what`, for each: the last part of its path, in characters that every tracker takes,
    told apart by a number where two have the same."""
    short = [re.sub(r"[^\w.-]+", "-", Path(source).name).strip("-") or "source" for source in sources]
    return [
        f"{what}/{name}" if short.count(name) == 1 else f"{what}/{name}-{number}"
        for number, name in enumerate(short, start=1)
    ]
