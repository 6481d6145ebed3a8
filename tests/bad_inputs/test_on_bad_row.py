"""data.on_bad_row: what is left out, counted and written down, and how much of it a run puts up with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs import test_meaning, test_schema
from tests.bad_inputs.desk import DATA, RECIPE, Case, Desk, chat, plain, run

SKIP = ("--data.on_bad_row", "skip")
HALF = (*SKIP, "--data.max_bad_share", "0.5")
ROWS = [plain(number) for number in range(40)]
NO_ROLE = chat(("user", "Hello?"), {"content": "Yes."})
CUT = '{"messages": [{"role": "user"'
# Of one row they say what all rows say, or they follow a policy of their own.
NOT_OF_A_ROW = {"one character a million times", "unknown columns", "text beside messages"}
BAD_ROWS = [
    case
    for case in (*test_schema.CASES, *test_meaning.CASES)
    if case.code == DATA and case.name not in NOT_OF_A_ROW and isinstance(case.content, list)
]


def rejects_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text("utf-8").splitlines()]


def test_bad_rows_are_left_out_counted_told_and_written_down(desk: Desk) -> None:
    rows = [*ROWS[:3], NO_ROLE, *ROWS[3:], CUT]
    outcome = desk.train(rows, *SKIP)
    outcome.trained("2 rows (4.8%) left out", "left out: ", "line 4: message 2 has no role", "steps over 40 samples")
    first, second = rejects_in(desk.folder / "out")
    assert first["source"].endswith("rows.jsonl") and (first["line"], first["unit"]) == (4, "line")
    assert "message 2 has no role" in first["problems"][0] and json.loads(first["row"]) == NO_ROLE
    assert second["line"] == 42 and "cut short" in second["problems"][0] and second["row"] == CUT


@pytest.mark.parametrize("case", BAD_ROWS, ids=lambda case: case.id)
def test_every_bad_row_of_the_tables_can_be_left_out(case: Case, desk: Desk) -> None:
    is_tokens = any("input_ids" in row for row in case.content)
    fill = [test_meaning.SAME if is_tokens else row for row in ROWS[:6]]
    desk.train([*fill, *case.content], *HALF).trained(" left out, as they cannot be read or trained on")
    lines = [entry["line"] for entry in rejects_in(desk.folder / "out")]
    assert lines and set(lines) <= set(range(7, 7 + len(case.content)))
    assert len(lines) == len(case.content) - sum(row in (plain(1), test_meaning.SAME) for row in case.content)


def test_more_bad_rows_than_the_share_refuse_the_run_and_are_written_down(desk: Desk) -> None:
    outcome = desk.train([*ROWS[:8], NO_ROLE, CUT], *SKIP)
    outcome.refused(
        DATA, "data.max_bad_share: 2 of 10 rows (20.0%)", "line 9: message 2 has no role", "line 10, column"
    )
    assert [entry["line"] for entry in rejects_in(desk.folder / "out")] == [9, 10]


def test_all_problems_of_training_and_validation_rows_come_at_once(desk: Desk) -> None:
    aside = desk.file([plain(1), NO_ROLE], "aside.jsonl")
    outcome = desk.train([NO_ROLE, plain(2), CUT], "--validation", str(aside))
    outcome.refused(
        DATA, "3 problems", "rows.jsonl line 1: message 2", "rows.jsonl line 3", "aside.jsonl line 2: message 2"
    )
    assert not (desk.folder / "out" / "rejects.jsonl").exists()


def test_bad_validation_rows_are_left_out_too(desk: Desk) -> None:
    aside = desk.file([plain(1), NO_ROLE], "aside.jsonl")
    desk.train(ROWS, "--validation", str(aside), *HALF).trained("1 validation rows left out")
    assert rejects_in(desk.folder / "out")[0]["source"].endswith("aside.jsonl")


def test_the_same_is_told_and_written_down_where_the_tokens_come_from_the_cache(desk: Desk) -> None:
    kept = (*SKIP, "--data.cache", "--data.cache_dir", str(desk.folder / "cache"))
    data = desk.file([*ROWS, NO_ROLE])
    first = desk.run(data, *kept, output=desk.folder / "one")
    second = desk.run(data, *kept, output=desk.folder / "two")
    first.trained("1 rows (2.4%) left out", "line 41: message 2")
    second.trained("tokenised before", "1 rows (2.4%) left out", "line 41: message 2")
    assert rejects_in(desk.folder / "one") == rejects_in(desk.folder / "two")
    reports = [json.loads((desk.folder / name / "plan.json").read_text())["data"] for name in ("one", "two")]
    assert reports[0] == reports[1] and reports[0]["bad_rows"] == 1
    again = desk.run(data, *kept, "--data.max_bad_share", "0.01", output=desk.folder / "three")
    again.refused(DATA, "data.max_bad_share: 1 of 41 rows", "line 41: message 2")


def test_several_processes_leave_the_same_rows_out_in_the_same_order(desk: Desk) -> None:
    rows = [NO_ROLE if number % 50 == 7 else plain(number) for number in range(1_000)]
    for name, workers in (("one", "0"), ("two", "2")):
        desk.train(rows, *SKIP, "--data.workers", workers, output=desk.folder / name).trained("20 rows (2.0%) left out")
    assert rejects_in(desk.folder / "one") == rejects_in(desk.folder / "two")


def test_what_cannot_be_read_to_its_end_is_refused_even_so(desk: Desk) -> None:
    text = json.dumps([*ROWS, NO_ROLE])
    desk.run(desk.file(text[:-30], "rows.json"), *HALF).refused(DATA, "rows.json line 1, column", "broken JSON")


def test_rows_that_are_only_too_long_follow_their_own_policy(desk: Desk) -> None:
    long = chat(("user", "How far?"), ("assistant", "far " * 500))
    desk.train([*ROWS, long], *SKIP).refused(DATA, "line 41", "more than training.max_seq_len 256", "data.overlong")


def test_a_preview_shows_a_row_that_will_be_left_out_with_its_problem(desk: Desk) -> None:
    data = desk.file([NO_ROLE, *ROWS])
    words = ("preview", "--model.tokenizer", str(desk.model), "--data", str(data), "--data.cache", "false", "--json")
    row, *_, counts = (json.loads(line) for line in run(*words, *SKIP, "--rows", "1").out.splitlines())
    assert "line 1: message 2 has no role" in row["problems"][0] and not row["ids"]
    assert counts["counts"]["bad_rows"] == 1 and counts["counts"]["samples"] == 40
    assert not (desk.folder / "rejects.jsonl").exists()


def test_rejects_of_an_earlier_run_do_not_stay(desk: Desk) -> None:
    desk.train([*ROWS[:8], NO_ROLE, CUT], *SKIP).refused(DATA, "data.max_bad_share")
    desk.train(ROWS, *SKIP).trained()
    assert not (desk.folder / "out" / "rejects.jsonl").exists()


def test_a_share_without_leaving_out_is_refused(desk: Desk) -> None:
    desk.train(ROWS, "--data.max_bad_share", "0.2").refused(RECIPE, "data.max_bad_share", "data.on_bad_row: skip")
