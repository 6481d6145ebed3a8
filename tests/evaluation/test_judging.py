"""Metrics by name, and a user's own function: found, run on each row, and its errors told with the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_hub.errors import DataError, RecipeError
from training_hub.evaluation.judging import METRICS, find_function, judge, metrics_of, objections
from training_hub.evaluation.texts import Texts
from training_hub.recipe.evaluation import GROUPS, TEXT_METRICS

TEXTS = Texts(["1", "2", "x"], ["1", "3", "5"], ["one?", "two?", "three?"], ["f line 1", "f line 2", "f line 3"])

OWN = """
def distance(answer, reference):
    return abs(int(answer) - int(reference))

def knows_the_question(answer, reference, prompt):
    return prompt.startswith("t")

constant = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("undefined\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_recipe_knows_exactly_the_metrics_of_the_table():
    assert tuple(METRICS) == TEXT_METRICS
    assert all(set(names) <= set(METRICS) for names in GROUPS.values())


def test_every_metric_gives_the_whole_and_each_row():
    whole, rows = judge(TEXTS, metrics_of([*TEXT_METRICS, "rouge", "perplexity"]))
    assert list(whole) == list(TEXT_METRICS)
    assert len(rows) == 3 and all(list(row) == list(TEXT_METRICS) for row in rows)
    assert whole["exact_match"] == pytest.approx(1 / 3)


def test_a_function_of_the_users_is_a_metric_by_file_by_module_and_as_it_is(own: Path):
    texts = Texts(["1", "2"], ["1", "4"], ["one?", "two?"])
    by_path = metrics_of(["mine.py:distance", "mine:knows_the_question", "mine.distance"][:2])
    assert judge(texts, by_path)[0] == {"distance": 1.0, "knows_the_question": 0.5}
    assert find_function("mine.distance")("3", "1") == 2

    def longer(answer: str, reference: str) -> bool:
        return len(answer) > len(reference)

    assert judge(texts, metrics_of([], [longer]))[0] == {"longer": 0.0}


def test_an_error_in_it_names_the_row_and_what_was_said(own: Path):
    with pytest.raises(DataError) as caught:
        judge(TEXTS, metrics_of(["mine.py:distance"]))
    (problem,) = caught.value.problems
    assert "metric distance: f line 3: ValueError: invalid literal" in problem and "'x'" in problem and "'5'" in problem


def returns(value: Any) -> Any:
    return lambda answer, reference: value


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), float("inf")])
def test_what_is_no_finite_number_is_an_error_for_each_row(value: Any):
    with pytest.raises(DataError) as caught:
        judge(Texts(["a"] * 8, ["b"] * 8), metrics_of([], [returns(value)]))
    assert len(caught.value.problems) == 6 and caught.value.problems[-1] == "and 3 more problems"
    assert "row 1" in caught.value.problems[0] and "number" in caught.value.problems[0]


@pytest.mark.parametrize(
    "path, said",
    [
        ("mine.py:nothing", "has no attribute 'nothing'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("missing.py:f", "there is no file missing.py"),
        ("mine.constant", "a function is wanted"),
        ("broken.py:f", "NameError: name 'undefined' is not defined"),
    ],
)
def test_a_function_that_cannot_be_had_is_an_objection(own: Path, path: str, said: str):
    assert said in objections([path])[0]
    with pytest.raises(RecipeError, match=r"evaluation\.metrics"):
        metrics_of([path])
