"""Rows of Parquet files in bounded memory, whatever their few bytes stand for, and rows that come from Arrow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from training_hub.data.files import MOST_TIMES, UNPACKED_FREELY, Swollen

BATCH_BYTES = 512 << 20
"""What a batch of rows may take at most."""
BATCH_ROWS = 1024


def parquet_rows(stream: BinaryIO, num_bytes: int) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file of `num_bytes`, packed or not, with nested values as dictionaries and lists.

    Raises Swollen before anything is unpacked that becomes too much, and pyarrow's errors where the file is damaged.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(stream) as opened:
        for batch in opened.iter_batches(batch_size=_rows_at_once(opened.metadata, num_bytes)):
            yield from batch.to_pylist()


def _rows_at_once(metadata: Any, num_bytes: int) -> int:
    """So many rows that their values take no more than BATCH_BYTES.

    A value can be as long as all that its column chunk holds, and be repeated in any number of rows for a few bits.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [(group, group.column(number)) for group in groups for number in range(metadata.num_columns)]
    # Items of lists beyond one per row are counted, too: a billion equal ones take a few bytes.
    unpacked = sum(column.total_uncompressed_size + column.num_values - group.num_rows for group, column in columns)
    if unpacked > max(UNPACKED_FREELY, MOST_TIMES * num_bytes):
        raise Swollen
    largest = max((column.total_uncompressed_size for _, column in columns), default=1)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(largest, 1)))


def without_null_fields(row: Mapping[str, Any], tally: Counter[str]) -> dict[str, Any]:
    """The row without null fields in nested structs.

    Arrow gives every struct of a column the same fields, so a tool call would otherwise carry the argument names of
    all other tools, each with null. What was null and what absent cannot be told apart; tally["null_fields"] counts.
    """
    return {key: _pruned(value, tally) for key, value in row.items()}


def _pruned(value: Any, tally: Counter[str]) -> Any:
    if isinstance(value, dict):
        kept = {key: _pruned(inner, tally) for key, inner in value.items() if inner is not None}
        tally["null_fields"] += len(value) - len(kept)
        return kept
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_pruned(inner, tally) for inner in value]
    return value
