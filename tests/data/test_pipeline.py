"""Rows on their way to the store: in several processes as in one, all problems at once, in constant memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.tiny import CHATML, chat_tokenizer, template
from training_hub.data.pipeline import Task, _chunks, _with_workers, read_tasks
from training_hub.data.prepare import Kitchen, Prepared, prepare
from training_hub.data.sources import open_object, open_sources
from training_hub.data.store import COLUMNS, TokenStore
from training_hub.data.workers import can_fork, num_cores
from training_hub.errors import DataError
from training_hub.monitoring.console import SilentConsole
from training_hub.recipe import Recipe
from training_hub.types import Origin

TOKENIZER = chat_tokenizer()
TEMPLATE = template(CHATML, TOKENIZER)


class Listener:
    """A console that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.advanced: dict[str, float] = {}

    def say(self, line: str) -> None:
        self.said.append(line)

    @contextmanager
    def progress(self, what: str, total: float | None = None, unit: str = "rows") -> Iterator[Callable[[float], None]]:
        self.advanced[what] = 0.0

        def advance(amount: float) -> None:
            self.advanced[what] += amount

        yield advance


def recipe(path: Any, max_seq_len: int = 512, **data: Any) -> Recipe:
    settings = {"path": path, "cache": False, "workers": 0, **data}
    sections = {"model": {"path": "model"}, "data": settings, "training": {"max_seq_len": max_seq_len}}
    return Recipe.model_validate({**sections, "output": "out"})


def prepared(path: Any, console: Listener | None = None, rows: Any = None, **settings: Any) -> Prepared:
    with_template = settings.pop("template", TEMPLATE)
    made = recipe(path, **settings)
    return prepare(made, tokenizer=TOKENIZER, template=with_template, console=console or Listener(), rows=rows)


def problems_of(path: Any, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepared(path, **settings)
    return caught.value.problems


def chat(number: int, answer: Any = None) -> dict[str, Any]:
    question = {"role": "user", "content": f"What comes after {number}?"}
    return {"messages": [question, {"role": "assistant", "content": answer or f"{number + 1}."}]}


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def assert_same(one: TokenStore, other: TokenStore) -> None:
    assert one.part_names == other.part_names
    for name in COLUMNS:
        assert one.columns[name].tobytes() == other.columns[name].tobytes(), name


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_several_processes_make_the_same_store_and_report_as_one(tmp_path: Path, overlong: str) -> None:
    rows = [chat(number, "word " * (number % 40) + "end.") for number in range(1500)]
    for half in (0, 1):
        written(tmp_path / f"{half}.jsonl", rows[half::2])
    one, two = (prepared(str(tmp_path), workers=count, max_seq_len=48, overlong=overlong) for count in (0, 2))
    assert_same(one.train, two.train)
    assert one.report == two.report
    assert one.train.fingerprint == two.train.fingerprint


def test_several_processes_find_the_same_problems_in_the_same_order(tmp_path: Path) -> None:
    many = [chat(number) if number % 300 else '{"messages": oops}' for number in range(2000)]
    written(tmp_path / "a.jsonl", many)
    written(tmp_path / "b.jsonl", ["not json"] * 3)
    written(tmp_path / "c.jsonl", [{"who": "knows"}])
    path = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    one, two = (problems_of(path, workers=count) for count in (0, 2))
    assert one == two
    files = [line.split(" line ")[0].rsplit("/", 1)[-1] for line in one]
    assert files == ["a.jsonl"] * 7 + ["b.jsonl"] * 3 + ["c.jsonl"]


def test_all_problems_are_named_by_file_line_and_message_in_one_go(tmp_path: Path) -> None:
    path = written(
        tmp_path / "chat.jsonl",
        [
            chat(1),
            '{"messages": [}',
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "narrator", "content": "x"}]},
            {"messages": [{"role": "user", "content": "Hi"}]},
            ["a", "list"],
            chat(2, "word " * 600),
        ],
    )
    broken, role, untrained, listed, long = problems_of(str(path))
    assert broken.startswith(f"{path} line 2, column 15: broken JSON")
    assert role.startswith(f"{path} line 3: message 2 has role 'narrator'")
    assert untrained.startswith(f"{path} line 4: nothing to train on")
    assert listed.startswith(f"{path} line 5: a row is an object")
    assert long.startswith(f"{path} line 6: ") and "training.max_seq_len 512" in long


def test_problems_shown_are_capped_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", [chat(1), *['{"messages"'] * 700])
    *shown, last = problems_of(str(path))
    assert len(shown) == 20
    assert last == "and 680 more problems"


def test_the_format_is_said_and_a_later_row_of_another_format_is_named(tmp_path: Path) -> None:
    console = Listener()
    path = written(tmp_path / "chat.jsonl", [chat(1), {"instruction": "Add.", "output": "3"}])
    with pytest.raises(DataError, match=r"line 2: no conversation.*those of instruction; one source has one format"):
        prepared(str(path), console)
    assert any("messages rows" in line for line in console.said)


def test_the_format_is_found_behind_rows_that_cannot_be_read(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", ["oops", {"question": "1 + 1?", "answer": "2"}])
    (problem,) = problems_of(str(path))
    assert problem.startswith(f"{path} line 1, column 1: broken JSON")


def test_a_file_in_which_nothing_can_be_read_names_every_line(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", ["oops"] * 300)
    *shown, last = problems_of(str(path))
    assert shown[0].startswith(f"{path} line 1, column 1") and last == "and 280 more problems"


@pytest.mark.parametrize("limit", [1, 255, 256, 257, 400, 5000])
def test_max_rows_takes_the_first_rows_over_all_files(tmp_path: Path, limit: int) -> None:
    rows = [chat(number) for number in range(600)]
    for name, part in (("a", rows[:300]), ("b", rows[300:])):
        written(tmp_path / f"{name}.jsonl", part)
    made = prepared(str(tmp_path), max_rows=limit)
    assert made.report["rows"] == len(made.train) == min(limit, 600)
    first = prepared(None, rows=rows[:limit]).train
    assert made.train.columns["ids"].tobytes() == first.columns["ids"].tobytes()


def test_rows_behind_max_rows_are_not_even_opened(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [chat(number) for number in range(10)])
    written(tmp_path / "b.jsonl", ["oops"])
    console = Listener()
    made = prepared([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], console, max_rows=10)
    assert made.report["rows"] == 10


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_every_token_of_rows_that_are_too_long_is_accounted_for(overlong: str) -> None:
    rows = [chat(number, "word " * (number % 30) + "end.") for number in range(200)]
    whole = prepared(None, rows=rows).report
    report = prepared(None, rows=rows, max_seq_len=40, overlong=overlong).report
    assert 0 < report["overlong"] < 200
    assert report["trained_tokens"] == whole["trained_tokens"] - report.get("trained_tokens_lost", 0)
    if overlong == "split":
        assert "tokens_lost" not in report
    else:
        assert report["tokens"] == whole["tokens"] - report["tokens_lost"]


def test_facts_are_said_once_and_notes_counted_by_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Ho"}]}] * 600
    console = Listener()
    prepared(str(written(tmp_path / "chat.jsonl", rows)), console, workers=2)
    assert [line for line in console.said if "human" in line] == ["data: role 'human' is read as user"]


def test_long_rows_travel_in_smaller_chunks_and_few_rows_in_this_process(tmp_path: Path) -> None:
    short, long = ([(Origin("a", n), row) for n in range(600)] for row in ({"text": "a"}, b" " * 100_000))
    assert [len(chunk) for chunk in _chunks(short)] == [256, 256, 88]
    assert {len(chunk) for chunk in _chunks(long)} == {11, 6}
    assert [len(chunk) for chunk in _chunks(short, 400)] == [400, 200]
    assert {len(chunk) for chunk in _chunks(long, most_bytes=250_000)} == {3}
    task = Task(0, 0, "text", [])
    assert _with_workers(iter([task] * 9), None)[0] == 0
    count, tasks = _with_workers(iter([task] * 30), None)
    assert count == (num_cores() if can_fork() else 0)
    assert len(list(tasks)) == 30


def test_chunks_are_as_large_as_the_recipe_says_and_change_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", [chat(number) for number in range(60)])
    usual = recipe(str(path))
    for settings, sizes in (({}, [60]), ({"chunk_rows": 25}, [25, 25, 10]), ({"chunk_bytes": 1}, [1] * 60)):
        kitchen = Kitchen(recipe(str(path), **settings), TOKENIZER, TEMPLATE, Listener())
        sources = open_sources(kitchen.recipe.data)
        tasks = list(read_tasks(sources, kitchen.work(sources), Listener()))
        assert [len(task.rows) for task in tasks] == sizes
        assert_same(prepared(str(path), **settings).train, prepared(usual.data.path).train)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", [chat(number) for number in range(600)])
    console = Listener()
    prepared(str(path), console)
    assert console.advanced["tokenising"] == pytest.approx(path.stat().st_size / 1e6)


def test_a_generator_is_read_once_and_gives_the_rows_of_a_list() -> None:
    rows = [chat(number) for number in range(300)]
    assert_same(prepared(None, rows=(row for row in rows)).train, prepared(None, rows=rows).train)


def test_stores_hold_the_origin_of_every_sample(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", ["", chat(1), "", chat(2)])
    store = prepared(str(path)).train
    assert [str(store[i].origin) for i in range(len(store))] == [f"{path} line 2", f"{path} line 4"]
    assert np.array_equal(store.lengths, [len(store[0]), len(store[1])])


def test_arrays_in_live_rows_are_read_as_lists_and_told_apart_however_long() -> None:
    first, second = np.arange(5000) % 300, np.arange(5000) % 300
    second[2500] = 7
    one, other = ([{"input_ids": ids, "labels": ids}] for ids in (first, second))
    assert prepared(None, rows=one, max_seq_len=5000).train[0].ids.tolist() == first.tolist()
    sums = [open_object(rows).parts[0].fingerprint(SilentConsole()) for rows in (one, other)]
    assert sums[0] != sums[1]


def test_pretraining_refuses_rows_that_want_tokens_left_out() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}]
    assert "data.pretraining trains every token alike" in problems_of(None, rows=rows, pretraining=True)[0]
    weighted = [{"text": "Hello there.", "weight": 2.0}]
    assert "rows row 1: " in problems_of(None, rows=weighted, pretraining=True)[0]


def test_a_column_that_is_named_but_in_no_row_is_a_problem() -> None:
    rows = [{"text": "Hello", "importance": 2.0}, {"text": "there"}]
    assert problems_of(None, rows=rows, columns={"weight": "imprtance"}) == [
        "data.columns: no row has a column 'imprtance'. Take it out, or write the name it has."
    ]
    assert prepared(None, rows=rows, columns={"weight": "importance"}).train.trained_weight[0] >= 2.0


def test_validation_rows_of_which_nothing_is_left_are_a_problem(tmp_path: Path) -> None:
    path = written(tmp_path / "long.jsonl", [chat(1, "word " * 300)])
    (problem,) = problems_of(None, rows=[chat(1)], validation=str(path), max_seq_len=100, overlong="drop")
    assert problem.startswith(f"data.validation: {path}: all 1 rows are longer")


def test_an_array_nested_too_deep_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text('[{"text": ' + "[" * 200_000 + "]" * 200_000 + "}]")
    (problem,) = problems_of(str(path))
    assert "nested too deep" in problem and str(path) in problem


PEAK = """
import resource, sys
from tests.data.test_pipeline import prepared
ids = [*range(249), *range(249)]
rows = ({"input_ids": [n % 300, n // 300, *ids], "weights": [1] * 500} for n in range(int(sys.argv[1])))
made = prepared(None, rows=rows, validation_fraction=0.1)
print(len(made.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_ten_times_the_rows_need_no_more_memory() -> None:
    peaks = {}
    for count in (2_000, 20_000):
        arguments = [sys.executable, "-c", PEAK, str(count)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        made, peaks[count] = (int(word) for word in done.stdout.split())
        assert made == count * 0.9
    # MiB. The larger store has 72 MiB more of tokens and weights alone; as lists they would be several times that.
    assert peaks[20_000] < peaks[2_000] + 30, peaks
