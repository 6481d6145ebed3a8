"""Small files that unpack to gigabytes, and templates without end, stop a run at once and take little memory."""

from __future__ import annotations

import gzip
import io
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from training_hub.data.parquet import parquet_rows

ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def gzipped(piece: bytes, start: bytes = b"") -> bytes:
    """A gigabyte of the same bytes, packed as many members of 64 MiB."""
    member = gzip.compress(piece * ((64 << 20) // len(piece)))
    return gzip.compress(start) + member * 16


def zstandard_of(piece: bytes, start: bytes = b"") -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: pip install 'training-hub[zstd]'")
    pack = zstandard.ZstdCompressor().compress
    return pack(start) + pack(piece * ((64 << 20) // len(piece))) * 16


def parquet_of(column: pyarrow.Array) -> bytes:
    held = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), held, compression="zstd")
    return held.getvalue()


def one_list_of_many_items() -> bytes:
    zeros = pyarrow.array(np.zeros(80 << 20, np.int8))
    return parquet_of(pyarrow.LargeListArray.from_arrays(pyarrow.array([0, len(zeros)], pyarrow.int64()), zeros))


def many_large_texts() -> bytes:
    return parquet_of(pyarrow.array(["x" * (96 << 20)]))


BOMBS: dict[str, Callable[[], bytes]] = {
    "spaces.jsonl.gz": lambda: gzipped(b" ", ROW),
    "lines.jsonl.gz": lambda: gzipped(ROW),
    "blank lines.jsonl.gz": lambda: gzipped(b"\n" + b" " * 1023, ROW),
    "array of spaces.json.gz": lambda: gzipped(b" ", b"["),
    "array of numbers.json.gz": lambda: gzipped(b" " * 1023 + b"1", b"["),
    "lines.csv.gz": lambda: gzipped(b"a" * 1023 + b"\n", b"text\n"),
    "document.txt.gz": lambda: gzipped(b"a"),
    "lines.jsonl.zst": lambda: zstandard_of(ROW),
    "spaces.jsonl.zst": lambda: zstandard_of(b" ", ROW),
    "text.parquet": many_large_texts,
    "list.parquet": one_list_of_many_items,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_gigabytes_is_refused(name: str, tmp_path: Path, words: Any, call: Any):
    file = tmp_path / name
    file.write_bytes(BOMBS[name]())
    assert file.stat().st_size < 4 << 20
    before = peak_mib()
    said = call(*words("--data.on_bad_row=skip", data=file))
    assert said.code == 3, said.text
    assert "unpacks to more than" in said.text or "max_row_bytes" in said.text
    assert name in said.text
    assert peak_mib() - before < 700


def test_one_text_that_many_rows_share_is_read_a_few_rows_at_a_time():
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1024, pyarrow.int32()), ["a b " * (2 << 20)])
    packed = parquet_of(shared)
    assert len(packed) < 1 << 20
    before = peak_mib()
    rows = parquet_rows(io.BytesIO(packed), len(packed))
    assert len(next(rows)["text"]) == len(next(rows)["text"]) == 8 << 20
    assert peak_mib() - before < 1500  # all of them would be 8,192


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_the_first_row_at_which_a_template_is_stopped_ends_the_run(
    on_bad_row: str, workers: int, tmp_path: Path, words: Any, call: Any
):
    template, data = tmp_path / "endless.jinja", tmp_path / "rows.jsonl"
    template.write_text(ENDLESS)
    data.write_bytes(ROW * 2000)  # minutes, were each of them tried
    asked = (f"--data.chat_template={template}", f"--data.on_bad_row={on_bad_row}", f"--data.workers={workers}")
    said = call(*words(*asked, data=data))
    assert said.code == 3
    assert "rows.jsonl line 1: chat template" in said.text
    assert "endless.jinja, line 1: stopped: it " in said.text
    assert "line 2:" not in said.text
