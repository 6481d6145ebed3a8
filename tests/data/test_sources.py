"""Files and objects become rows with their place, and what cannot be read is named by file, line and column."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from training_hub.data.readers import Broken, decode
from training_hub.data.sources import Source, open_object, open_path, open_sources
from training_hub.errors import DataError
from training_hub.monitoring.console import SilentConsole
from training_hub.recipe.sections import Data, DataSource

ROWS: list[dict[str, Any]] = [{"text": f"row {number}, ünïcode", "n": number} for number in range(5)]


def read(source: Source) -> list[Any]:
    tally: Counter[str] = Counter()
    return [decode(raw, origin) for part in source.parts for origin, raw in part.rows(tally)]


def problems(source: Source) -> list[str]:
    return [row.problem for row in read(source) if isinstance(row, Broken)]


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]] = ROWS) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


CONTENTS = {
    "rows.jsonl": lines(),
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.parquet": parquet(),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("packed", ["plain", "gzip", "zstd"])
def test_every_kind_of_file_gives_the_same_rows_plain_and_compressed(tmp_path: Path, name: str, packed: str) -> None:
    pack = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[packed]
    suffix = {"plain": "", "gzip": ".gz", "zstd": ".zst"}[packed]
    assert read(open_path(written(tmp_path, name + suffix, pack(CONTENTS[name])))) == ROWS


def test_a_file_is_recognised_by_its_bytes_whatever_its_name_and_says_so(tmp_path: Path) -> None:
    cases = {"parquet.jsonl": parquet(), "array.jsonl": CONTENTS["rows.json"], "lines.json": lines()}
    for name, content in {**cases, "gzip.jsonl": gzip.compress(lines()), "noname": lines()}.items():
        source = open_path(written(tmp_path, name, content))
        assert read(source) == ROWS
        assert bool(source.notes) == (name != "gzip.jsonl")


def test_byte_order_mark_windows_line_ends_blank_lines_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\r\n").rstrip()
    source = open_path(written(tmp_path, "rows.jsonl", content))
    tally: Counter[str] = Counter()
    numbered = list(source.parts[0].rows(tally))
    assert [decode(raw, origin) for origin, raw in numbered] == ROWS
    assert [origin.line for origin, _ in numbered] == [1, 3, 5, 7, 9]
    assert tally["blank_lines"] == 4


def test_broken_json_is_named_by_line_and_column_and_reading_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", b'{"text": "a"}\n{"text" "b"}\n{"text": "c"}\n{"text": "d')
    rows = read(open_path(path))
    assert [row for row in rows if isinstance(row, dict)] == [{"text": "a"}, {"text": "c"}]
    middle, last = (row.problem for row in rows if isinstance(row, Broken))
    assert middle.startswith(f"{path} line 2, column 9: broken JSON")
    assert last.startswith(f"{path} line 4, column ") and "cut short" in last


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"a": "caf\xe9"}', "byte 11 of the line (0xe9) is not UTF-8"),
        (b'{"a": "\x00"}', "NUL byte"),
        (b"[1, 2]", "a row is an object"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_json_or_text_cannot_be_is_named_by_line(tmp_path: Path, line: bytes, says: str) -> None:
    path = written(tmp_path, "rows.jsonl", lines()[: lines().index(b"\n") + 1] + line + b"\n")
    (problem,) = problems(open_path(path))
    assert problem.startswith(f"{path} line 2")
    assert says in problem


def test_a_pair_of_surrogates_is_text(tmp_path: Path) -> None:
    assert read(open_path(written(tmp_path, "rows.jsonl", b'{"a": "\\ud83d\\ude00"}\n'))) == [{"a": "😀"}]


@pytest.mark.parametrize(
    ("content", "place", "says"),
    [
        (b'[\n{"a": 1},\n{"a" 2}\n]', " line 3, column 6:", "broken JSON"),
        (b'[{"a": 1},\n {"a": 2}', " line 2, column 10:", "cut short"),
        (b'[{"a": 1}, ]', " line 1, column 12:", "a value expected"),
        (b'[{"a": 1} {"a": 2}]', " line 1, column 11:", "',' or ']' expected"),
        (b'[{"a": 1}] x', " line 1, column 12:", "after the end"),
        (b'[{"a": 1}, 7]', " row 2:", "a row is an object"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', " line 2:", "byte 19 of the file"),
    ],
)
def test_a_broken_array_is_named_by_line_and_column(tmp_path: Path, content: bytes, place: str, says: str) -> None:
    path = written(tmp_path, "rows.json", content)
    (problem,) = problems(open_path(path))
    assert problem.startswith(path + place), problem
    assert says in problem


def test_an_array_is_parsed_across_blocks_with_rows_larger_than_a_block(tmp_path: Path) -> None:
    rows = [{"text": "é" * length, "at": [1, {"b": length}]} for length in (0, 700_000, 3, 2_500_000, 1, 0)]
    path = written(tmp_path, "rows.json", json.dumps(rows, ensure_ascii=False, indent=2).encode())
    assert read(open_path(path)) == rows


def test_a_broken_row_after_the_first_block_of_an_array_has_the_right_line(tmp_path: Path) -> None:
    content = "[\n" + "".join(f'{{"text": "{"x" * 1000}", "n": {n}}},\n' for n in range(3000)) + '{"text": oops}\n]'
    path = written(tmp_path, "rows.json", content.encode())
    (problem,) = problems(open_path(path))
    assert problem.startswith(f"{path} line 3002, column 10:")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "0 rows"),
        ("blank.jsonl", b"\n \n", "0 rows"),
        ("rows.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("rows.jsonl", b"<!DOCTYPE html><html></html>", "HTML"),
        ("rows.zip", b"PK\x03\x04....", "zip"),
        ("rows.parquet", b'{"a": 1}\n', "not a Parquet file"),
        ("rows.dat", b"hello", "not recognised"),
        ("task.json", json.dumps({"Name": "x", "Rows": [{"a": 1}]}, indent=1).encode(), "'Rows' looks like the rows"),
        ("rows.jsonl.gz", gzip.compress(lines(), mtime=0)[:20], "cut short"),
    ],
)
def test_a_file_that_is_no_data_is_refused_with_what_it_is(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=says) as caught:
        open_path(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_compressed_data_that_is_cut_short_is_never_taken_for_the_whole(tmp_path: Path, packed: str) -> None:
    many = lines([{"text": f"{number * 7919 % 1000003}"} for number in range(20_000)])
    whole = gzip.compress(many) if packed == "gz" else zstandard.compress(many)
    path = written(tmp_path, f"rows.jsonl.{packed}", whole[: len(whole) * 3 // 4])
    assert "cut short or damaged" in problems(open_path(path))[-1]


def test_two_zstd_frames_are_one_file(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl.zst", zstandard.compress(lines()) + zstandard.compress(lines()))
    assert read(open_path(path)) == ROWS * 2


def test_csv_keeps_quotes_commas_and_newlines_and_numbers_rows_by_their_first_line(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", b'text,n\n"a, ""b""\nc",1\n\nd,2\n')
    numbered = list(open_path(path).parts[0].rows(Counter()))
    assert [row for _, row in numbered] == [{"text": 'a, "b"\nc', "n": "1"}, {"text": "d", "n": "2"}]
    assert [origin.line for origin, _ in numbered] == [2, 5]


def test_tabs_and_semicolons_separate_where_the_header_says_so(tmp_path: Path) -> None:
    assert read(open_path(written(tmp_path, "a.tsv", b"a\tb\n1\t2,3\n"))) == [{"a": "1", "b": "2,3"}]
    assert read(open_path(written(tmp_path, "b.csv", b"a;b\n1;2,3\n"))) == [{"a": "1", "b": "2,3"}]


def test_a_csv_row_with_too_many_values_is_named_and_a_field_may_be_long(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", b"a,b\n1,2,3\n" + b"x" * 300_000 + b",2\n")
    wrong, fine = read(open_path(path))
    assert wrong.problem.startswith(f"{path} line 2: 3 values, but the header names 2 columns")
    assert len(fine["a"]) == 300_000


def test_a_header_or_field_in_quotes_may_hold_the_other_delimiters(tmp_path: Path) -> None:
    assert read(open_path(written(tmp_path, "a.csv", b'"a","b;c"\n1,2\n'))) == [{"a": "1", "b;c": "2"}]


def test_parquet_structs_lose_the_fields_that_only_other_rows_have(tmp_path: Path) -> None:
    rows = [{"call": {"arguments": {"city": "Paris"}}}, {"call": {"arguments": {"year": 3}}}]
    assert read(open_path(written(tmp_path, "rows.parquet", parquet(rows)))) == rows


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    source = open_path(written(tmp_path, "book.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo."))
    assert read(source) == [{"text": "One.\n\nTwo."}]
    assert "one document" in source.notes[0]


def test_a_folder_is_all_its_data_files_sorted_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name, number in (("b.jsonl", 1), ("a.jsonl", 0)):
        written(tmp_path, name, lines([ROWS[number]]))
    written(tmp_path, "README.txt", b"about")
    (tmp_path / ".hidden").mkdir()
    written(tmp_path / ".hidden", "c.jsonl", lines())
    source = open_path(str(tmp_path))
    assert read(source) == ROWS[:2]
    assert "2 data files (a.jsonl, b.jsonl), 1 other files left out" in source.notes[0]


def test_a_glob_is_its_matches_and_an_empty_one_an_error(tmp_path: Path) -> None:
    for number in range(3):
        written(tmp_path, f"part-{number}.jsonl", lines([ROWS[number]]))
    assert read(open_path(str(tmp_path / "part-[02].jsonl"))) == [ROWS[0], ROWS[2]]
    with pytest.raises(DataError, match="no file matches"):
        open_path(str(tmp_path / "other-*.jsonl"))


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", lines())
    with pytest.raises(DataError, match=r"tran\.jsonl does not exist\. Near it: .*train\.jsonl"):
        open_path(str(tmp_path / "tran.jsonl"))


def test_all_missing_sources_are_named_at_once(tmp_path: Path) -> None:
    path: list[str | DataSource] = [str(tmp_path / "a.jsonl"), DataSource(path=str(tmp_path / "b.jsonl"), weight=2)]
    with pytest.raises(DataError) as caught:
        open_sources(Data(path=path))
    assert len(caught.value.problems) == 2


def test_something_else_than_a_file_is_refused() -> None:
    with pytest.raises(DataError, match="not an ordinary file"):
        open_path("/dev/null")


def test_a_hub_name_that_cannot_be_had_says_what_was_looked_for() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"nobody/nothing: there is no such file .* hub, it has no split 'train'"):
        open_path("nobody/nothing")


def test_live_objects_of_every_kind_give_the_same_rows() -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    objects = {
        "list": ROWS,
        "frame": pandas.DataFrame(ROWS),
        "dataset": datasets.Dataset.from_list(ROWS),
        "split": datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        "stream": datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        "table": pa.Table.from_pylist(ROWS),
        "iterator": iter(ROWS),
    }
    for name, rows in objects.items():
        assert read(open_object(rows)) == ROWS, name


def test_a_frame_cell_that_is_missing_is_left_out_of_its_row() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"text": "a", "weight": 2.0}, {"text": "b"}])
    assert read(open_object(frame)) == [{"text": "a", "weight": 2.0}, {"text": "b"}]


def test_a_dataset_folder_written_by_save_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(open_path(str(tmp_path / "saved"))) == ROWS


def test_equal_contents_have_equal_fingerprints_and_others_do_not(tmp_path: Path) -> None:
    same = [open_path(written(tmp_path, name, lines())) for name in ("a.jsonl", "b.jsonl")]
    other = open_path(written(tmp_path, "c.jsonl", lines(ROWS[:4])))
    assert fingerprint(same[0]) == fingerprint(same[1]) != fingerprint(other)
    assert fingerprint(open_object(ROWS)) == fingerprint(open_object(list(ROWS)))
    assert fingerprint(open_object(iter(ROWS))) is None


def fingerprint(source: Source) -> str | None:
    return source.parts[0].fingerprint(SilentConsole())


MEASURE = """
import resource, sys
from collections import Counter
from training_hub.data.readers import decode
from training_hub.data.sources import open_path
count = 0
for part in open_path(sys.argv[1]).parts:
    for origin, raw in part.rows(Counter()):
        count += isinstance(decode(raw, origin), dict)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_ten_times_the_rows_take_no_more_memory(tmp_path: Path, kind: str) -> None:
    used = {}
    for count in (10_000, 100_000):
        path = tmp_path / f"{count}.{kind}"
        with path.open("w") as file:
            file.write("[" if kind == "json" else "")
            for number in range(count):
                file.write(("," if kind == "json" and number else "") + f'{{"text": "{number} {"x" * 300}"}}\n')
            file.write("]" if kind == "json" else "")
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
        seen, used[count] = map(int, done.stdout.split())
        assert seen == count
    # The larger file has 30 MB more; holding its rows would show as more than that. Kilobytes.
    assert used[100_000] - used[10_000] < 8_000
