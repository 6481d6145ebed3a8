"""Rows left out because they cannot be read or trained on: one line of JSON for each, beside the tokens of the others.

They lie in the folder of the token store, so that a run that takes its tokens from the cache tells of them, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training_hub.data.readers import Broken, RawRow
from training_hub.data.store import TokenStore
from training_hub.errors import DataError
from training_hub.types import Origin

FILE_NAME = "rejects.jsonl"
TALLY = "bad_rows"
MOST_RAW_CHARACTERS = 1 << 20
EXAMPLES = 3
PROBLEMS_SHOWN = 20

Reject = dict[str, Any]


def reject(origin: Origin, problems: Sequence[str], raw: RawRow) -> Reject:
    """What is kept of a row that is left out: its place, its problems and, where it could be read, its text."""
    place = {"source": origin.source, "line": origin.line, "unit": origin.unit}
    return {**place, "problems": list(problems), "row": raw_text(raw, MOST_RAW_CHARACTERS) or None}


def raw_text(raw: RawRow, longest: int) -> str:
    """The row as text, cut after `longest` characters; "" where it could not be read."""
    if isinstance(raw, Broken):
        return ""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else _as_json(raw)
    text = text.strip()
    return text if len(text) <= longest else f"{text[:longest]}..."


def _as_json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=repr)


def append(rejects: Sequence[Reject], folder: Path) -> None:
    """Add these to the file in `folder`; none, no file."""
    if rejects:
        with (folder / FILE_NAME).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry) + "\n" for entry in rejects)


def rejected(store: TokenStore) -> Iterator[Reject]:
    """What was left out when `store` was made."""
    if store.folder is None or not (store.folder / FILE_NAME).exists():
        return
    with (store.folder / FILE_NAME).open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def write_all(stores: Sequence[TokenStore], path: Path) -> None:
    """Put what was left out of `stores` into one file; where that is nothing, no file, nor one of an earlier run."""
    path.unlink(missing_ok=True)
    with_rejects = [store for store in stores if store.report.get(TALLY)]
    if not with_rejects:
        return
    with path.open("w", encoding="utf-8") as stream:
        for store in with_rejects:
            stream.writelines(json.dumps(entry) + "\n" for entry in rejected(store))


def refuse_too_many(store: TokenStore, most: float) -> None:
    """Raise DataError, with the first problems, where more than the share `most` of the rows was left out."""
    bad, rows = store.report.get(TALLY, 0), store.report.get("rows", 0)
    if bad <= most * rows:
        return
    shown: list[str] = []
    total = 0
    for entry in rejected(store):
        total += len(entry["problems"])
        shown += entry["problems"][: PROBLEMS_SHOWN - len(shown)]
    rest = [f"and {total - len(shown):,} more problems"] if total > len(shown) else []
    share = (
        f"data.max_bad_share: {bad:,} of {rows:,} rows ({bad / rows:.1%}) cannot be trained on, more than the share "
        f"{most:g} that may be left out. Repair them, or raise it."
    )
    raise DataError([share, *shown, *rest])


def examples(store: TokenStore) -> list[str]:
    """The first problems of rows that were left out."""
    found = []
    for entry in rejected(store):
        found.append(entry["problems"][0])
        if len(found) == EXAMPLES:
            break
    return found
