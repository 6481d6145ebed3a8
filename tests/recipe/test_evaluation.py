"""The section of evaluation: what would do nothing, or is not measured, is refused in words that say what to write."""

from __future__ import annotations

from typing import Any

import pytest

from training_hub.errors import RecipeError
from training_hub.recipe.evaluation import Evaluation, lower_is_better, names_of, rows_generated
from training_hub.recipe.load import build, dump, load

MINIMAL = {"model.path": "m", "data.path": "d", "output": "o", "data.validation": "v"}
ASKED = {**MINIMAL, "evaluation.generate": True}


def problems(settings: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build(settings)
    return caught.value.problems


@pytest.mark.parametrize(
    "settings, said",
    [
        ({**MINIMAL, "evaluation.metrics": ["bleu"]}, "evaluation.generate: true"),
        ({**MINIMAL, "evaluation.max_new_tokens": 9}, "since nothing is generated"),
        ({**MINIMAL, "evaluation.batch_tokens": 9}, "since nothing is generated"),
        ({**ASKED, "evaluation.top_p": 0.5}, "evaluation.temperature: 0.7"),
        ({**ASKED, "evaluation.metrics": ["blue"]}, "Did you mean bleu?"),
        ({**ASKED, "evaluation.metrics": ["RougeL"]}, "Did you mean rougeL?"),
        ({**ASKED, "evaluation.metrics": ["a.py:f", "b.py:f"]}, "two metrics would be called 'f'"),
        ({**ASKED, "evaluation.metrics": ["mine.bleu"]}, "two metrics would be called 'bleu'"),
        ({**ASKED, "data.pretraining": True}, "ask nothing"),
        (
            {**ASKED, "evaluation.best_metric": "bleu", "checkpoint.keep_best": True},
            "measured: loss, perplexity, exact",
        ),
        (
            {**MINIMAL, "evaluation.best_metric": "exact_match", "checkpoint.keep_best": True},
            "evaluation.generate: true",
        ),
        ({**ASKED, "evaluation.best_metric": "exact_match"}, "checkpoint.keep_best: true"),
        ({**ASKED, "evaluation.best_mode": "max"}, "would change nothing"),
        ({**ASKED, "evaluation.early_stopping_min_delta": 0.1}, "evaluation.early_stopping_patience: 3"),
    ],
)
def test_what_does_nothing_or_is_not_measured_is_refused(settings: dict[str, Any], said: str):
    found = problems(settings)
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize("setting, value", [("generate", 8), ("early_stopping_patience", 2)])
def test_what_needs_validation_rows_says_so(setting: str, value: int):
    found = problems({"model.path": "m", "data.path": "d", "output": "o", f"evaluation.{setting}": value})
    assert "needs validation rows" in found[0] and "data.validation_fraction: 0.05" in found[0]


def test_rows_to_generate_are_a_number_or_a_usual_one():
    assert [rows_generated(Evaluation(generate=value)) for value in (False, True, 1, 500)] == [0, 64, 1, 500]
    assert "evaluation.generate" in problems({**MINIMAL, "evaluation.generate": -1})[0]


def test_the_best_metric_may_be_anything_that_is_measured():
    asked = Evaluation(generate=True, metrics=["rouge", "pkg.scores:mine"])
    assert names_of(asked) == [
        "loss",
        "perplexity",
        "rouge1",
        "rouge2",
        "rougeL",
        "mine",
        "unfinished",
        "answer_tokens",
    ]
    recipe = build(
        {**ASKED, "evaluation.metrics": ["a.py:f"], "evaluation.best_metric": "f", "checkpoint.keep_best": True}
    )
    assert load(dump(recipe)) == recipe


def test_less_is_better_of_loss_and_of_what_does_not_end():
    modes = {name: lower_is_better(Evaluation(best_metric=name)) for name in ("loss", "perplexity", "unfinished", "f1")}
    assert modes == {"loss": True, "perplexity": True, "unfinished": True, "f1": False}
    assert lower_is_better(Evaluation(best_metric="f1", best_mode="min"))
