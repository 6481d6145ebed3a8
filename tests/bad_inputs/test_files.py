"""Bad inputs 1 to 30: files that are not what their name says, cut, damaged, or not there."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.bad_inputs.desk import ALSO_GOOD, DATA, GOOD, ONE_STEP, Case, Desk, Outcome, as_bytes, plain, refuses, trains
from training_hub.frontends.cli import main

TWO = as_bytes([GOOD, ALSO_GOOD])
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet as written

    stream = io.BytesIO()
    written.write_table(pyarrow.Table.from_pylist([GOOD, ALSO_GOOD]), stream)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../../evil.jsonl", TWO)
    return stream.getvalue()


def zstd() -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(TWO)


CASES: tuple[Case, ...] = (
    trains(1, "byte order mark", b"\xef\xbb\xbf" + TWO, "messages rows"),
    trains(2, "CRLF", TWO.replace(b"\n", b"\r\n"), "messages rows"),
    trains(3, "blank lines", [GOOD, "", "  ", ALSO_GOOD], "2 blank lines passed over"),
    trains(4, "no final newline", TWO.rstrip(b"\n"), "plan: 1 steps over 2 samples"),
    refuses(
        5,
        "last line cut short",
        TWO[:-20],
        "rows.jsonl line 2, column",
        "after byte 87: was the file cut short? Copy it again",
    ),
    refuses(
        6, "broken JSON in the middle", [GOOD, '{"messages": [}', GOOD], "line 2, column 15", "near '{\"messages\": [}'"
    ),
    refuses(7, "not UTF-8", TWO + b'{"text": "caf\xe9"}\n', "line 3: byte 14 of the line (0xe9) is not UTF-8", "iconv"),
    refuses(8, "UTF-16", TWO.decode().encode("utf-16"), "looks like UTF-16; convert it"),
    refuses(9, "NUL bytes", [GOOD, '{"text": "a\0b"}'], "line 2, column 12", "NUL byte"),
    refuses(10, "empty file", b"", "rows.jsonl: 0 rows"),
    refuses(11, "empty array", "[]", "rows.jsonl: 0 rows"),
    trains(12, "array in jsonl", json.dumps([GOOD, ALSO_GOOD]), "holds a JSON array, and is read as such"),
    trains(13, "JSON lines in json", TWO, "holds JSON lines, and is read as such", file="rows.json"),
    refuses(
        14, "one object", json.dumps({"rows": [GOOD]}, indent=1), "one JSON object", "list 'rows'", file="rows.json"
    ),
    trains(15, "gzip", gzip.compress(TWO), "messages rows", file="rows.jsonl.gz"),
    trains(15, "zstd", zstd, "messages rows", file="rows.jsonl.zst"),
    refuses(15, "zip", zipped, "a zip archive; unpack it"),
    refuses(
        15,
        "gzip that unpacks to much",
        lambda: gzip.compress(b"x" * (20 << 20)),
        "line 1: longer than data.max_row_bytes",
        options=("--data.max_row_bytes", "1000000"),
        file="rows.jsonl.gz",
    ),
    trains(16, "Parquet in jsonl", parquet, "holds Parquet, and is read as such"),
    refuses(
        17,
        "line of 100 MB",
        lambda: as_bytes([GOOD, "x" * 100_000_000, GOOD]),
        "line 2: longer than data.max_row_bytes",
    ),
    refuses(25, "Git LFS pointer", LFS, "Git LFS pointer", "git lfs pull"),
    refuses(26, "HTML page", "<!DOCTYPE html><html><body>404</body></html>", "this is an HTML page"),
    refuses(27, "key twice", [GOOD, '{"text": "a", "text": "b"}'], "line 2: the key 'text' stands twice"),
    refuses(28, "NaN", [GOOD, '{"text": "a", "weight": NaN}'], "line 2: NaN is not JSON"),
    refuses(28, "Infinity", [GOOD, '{"text": "a", "weight": -Infinity}'], "line 2: -Infinity is not JSON"),
    refuses(29, "lone surrogate", [GOOD, '{"text": "\\ud800"}'], "line 2: a lone surrogate"),
    refuses(30, "1e400", [GOOD, '{"text": "a", "weight": 1e400}'], "line 2: the number 1e400 is too large"),
    refuses(30, "400 digits", [GOOD, f'{{"text": "a", "id": {"9" * 400}}}'], "line 2: the number 999", "400 digits"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_file(case: Case, desk: Desk) -> None:
    case.hold(desk)


def test_17_a_line_too_long_can_be_left_out(desk: Desk) -> None:
    rows = [*(plain(number) for number in range(9)), "x" * 100_000]
    words = ("--data.max_row_bytes", "10000", "--data.on_bad_row", "skip", "--data.max_bad_share", "0.2")
    desk.train(rows, *words).trained("1 rows (10.0%) left out", "line 10: longer than data.max_row_bytes 10,000")


def test_18_memory_does_not_grow_with_the_file(desk: Desk) -> None:
    small = desk.file([{**plain(0), "unread": "x" * 20_000}] * 50, "small.jsonl")
    large = desk.file([{**plain(number), "unread": "x" * 20_000} for number in range(4_000)], "large.jsonl")
    program = (
        "import resource, sys\nfrom training_hub.frontends.cli import main\n"
        "for data in sys.argv[2:]:\n"
        "    words = ['preview', '--model.tokenizer', sys.argv[1], '--data', data, '--rows', '1']\n"
        "    assert main([*words, '--data.workers', '0', '--data.cache', 'false']) == 0\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", program, str(desk.model), str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak "))
    unit = 1 if sys.platform == "darwin" else 1024
    assert large.stat().st_size > 80_000_000
    assert (second - first) * unit < large.stat().st_size / 3


def test_19_a_folder_is_its_files(desk: Desk) -> None:
    (desk.folder / "rows").mkdir()
    desk.file([GOOD], "rows/one.jsonl")
    desk.file([ALSO_GOOD], "rows/two.jsonl")
    desk.run(desk.folder / "rows").trained("folder with 2 data files (one.jsonl, two.jsonl)")


def test_19_a_folder_without_data_is_refused(desk: Desk) -> None:
    (desk.folder / "rows").mkdir()
    desk.file(b"\x00", "rows/weights.bin")
    desk.run(desk.folder / "rows").refused(DATA, "the folder holds no jsonl", "found weights.bin")


def test_20_a_missing_file_is_told_with_the_nearest_name(desk: Desk) -> None:
    desk.file([GOOD], "rows.jsonl")
    desk.run(desk.folder / "row.jsonl").refused(
        DATA, "row.jsonl does not exist", f"Near it: {desk.folder / 'rows.jsonl'}"
    )


def test_21_a_glob_without_a_match_is_told(desk: Desk) -> None:
    desk.run(desk.folder / "*.parquet").refused(DATA, f"{desk.folder / '*.parquet'}: no file matches")


def test_22_an_unreadable_file_is_told_with_mode_and_owner(desk: Desk) -> None:
    path = desk.file([GOOD])
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser reads everything but what the kernel itself refuses
        path = Path("/proc/self/mem")
        if not path.exists():
            pytest.skip("no file here that the superuser cannot read")
    desk.run(path).refused(DATA, "cannot be read: ", "mode -", "owner ")


class Appending(io.StringIO):
    """A standard output that lets the file grow while it is read: once its rows are recognised."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def write(self, text: str) -> int:
        if "messages rows" in text:
            with self.path.open("ab") as stream:
                stream.write(TWO)
        return super().write(text)


def test_23_a_file_that_grows_while_it_is_read_is_refused(desk: Desk) -> None:
    path = desk.file([GOOD, ALSO_GOOD])
    out, err = Appending(path), io.StringIO()
    words = ["sft", "--model", str(desk.model), "--data", str(path), "--output", str(desk.folder / "out"), *ONE_STEP]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    Outcome(code, out.getvalue(), err.getvalue()).refused(DATA, "rows.jsonl: the file changed while it was read")


def test_24_a_circle_of_links_is_refused(desk: Desk) -> None:
    path = desk.folder / "rows.jsonl"
    path.symlink_to(path)
    desk.run(path).refused(DATA, "symbolic link that leads nowhere, or in a circle")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_24_a_pipe_is_refused_without_waiting_for_it(desk: Desk) -> None:
    path = desk.folder / "rows.jsonl"
    os.mkfifo(path)
    desk.run(path).refused(DATA, "not an ordinary file (p")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero on this system")
def test_24_a_device_is_refused(desk: Desk) -> None:
    desk.run("/dev/zero").refused(DATA, "not an ordinary file (c")
