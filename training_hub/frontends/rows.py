"""What front ends ask of rows in memory: the first of them, what is in a column, many at a time as columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from training_hub.data.readers import Broken, decode

ROWS_AT_ONCE = 1000


def first_row(source: Any) -> Mapping[str, Any] | None:
    """The first row of a source; None where there is none, or where it cannot be read: the run tells why."""
    for part in source.parts:
        for origin, raw in part.rows(Counter()):
            row = decode(raw, origin)
            return None if isinstance(row, Broken) else row
    return None


def of_column(name: str, value: Any) -> tuple[dict[str, Any], bool]:
    """The settings by which the column `name`, that holds `value` in the first row, is trained on: as text, or as
    messages; and whether no template touches it."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return {"data.format": "text", **named({"text": name} if name != "text" else {})}, True
    turns = value if isinstance(value, list) else []
    is_sharegpt = bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
    ours = "conversations" if is_sharegpt else "messages"
    columns = named({ours: name} if name != ours else {})
    return {"data.format": "sharegpt" if is_sharegpt else "messages", **columns}, False


def named(columns: Mapping[str, str]) -> dict[str, Any]:
    """data.columns with these names, ours to theirs; nothing where there are none."""
    return {"data.columns": dict(columns)} if columns else {}


def dictionaries(rows: Any) -> Iterable[Mapping[str, Any]]:
    """The rows of a DataFrame or an Arrow table as dictionaries; all else gives them by itself."""
    package = type(rows).__module__.partition(".")[0]
    if package == "pandas":
        return rows.to_dict("records")
    if package == "polars":
        return rows.iter_rows(named=True)
    return rows.to_pylist() if package == "pyarrow" else rows


def batches(rows: Iterable[Mapping[str, Any]], most: int = ROWS_AT_ONCE) -> Iterator[dict[str, list[Any]]]:
    """Rows as columns, many at a time; a column that a row lacks is None in it."""
    held: list[Mapping[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == most:
            yield columns_of(held)
            held = []
    if held:
        yield columns_of(held)


def columns_of(rows: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows as columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
