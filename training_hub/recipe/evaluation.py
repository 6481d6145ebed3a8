"""The section of evaluation: what is measured on rows that are not trained, when, and what follows from it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from training_hub.recipe.sections import Count, NotNegative, Positive, Section, _a_number

if TYPE_CHECKING:
    from training_hub.recipe.recipe import Recipe

MEASURED_ANYWAY = ("loss", "perplexity")
"""What needs no generation."""

TEXT_METRICS = ("exact_match", "normalized_match", "accuracy", "f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
GROUPS = {"rouge": ("rouge1", "rouge2", "rougeL")}
ALWAYS = ("unfinished", "answer_tokens")
"""What every generation tells of its answers: the share cut at max_new_tokens, and how many tokens they have."""

LIVE = "live:"
"""What stands before the name of a function that was handed over from Python, which no file can name."""

LOWER_IS_BETTER = (*MEASURED_ANYWAY, *ALWAYS)

OWN_FUNCTION = re.compile(r"[\w./~-]+\.py:\w+|[A-Za-z_]\w*(\.\w+)*[.:][A-Za-z_]\w*")

ROWS_GENERATED = 64
"""Validation rows that evaluation.generate: true asks."""

TopP = Annotated[float, BeforeValidator(_a_number), Field(gt=0, le=1, allow_inf_nan=False)]


class Evaluation(Section):
    """What is measured on rows that are not trained, when, and what follows from it."""

    interval: Count | None = None
    """Every so many optimizer steps."""

    at_epoch: bool = True
    """At the end of each epoch."""

    at_start: bool = True
    """Before the first step."""

    generate: bool | Count = False
    """Also let the model answer validation rows, and compare with the rows' own answers: true for 64 rows spread over
    the set, or how many. What it said goes to predictions.jsonl."""

    metrics: list[str] = ["exact_match"]
    """What answers are compared by: exact_match, normalized_match, accuracy, f1, bleu, chrf, rouge (rouge1, rouge2,
    rougeL), or a function of your own as package.module:function or file.py:function, called as function(answer,
    reference). Loss and perplexity are measured in any case."""

    max_new_tokens: Count | None = None
    """Longest answer, in tokens. Default: a fourth more than the longest of the rows' own, at least 16 and at most
    512."""

    batch_tokens: Count = 16384
    """Tokens of prompts and answers that are generated at once, padding included. Bounds memory."""

    temperature: NotNegative = 0.0
    """0 takes the likeliest token each time; more draws, from the run's seed."""

    top_p: TopP = 1.0
    """With a temperature, draw among the likeliest tokens that hold this share together."""

    best_metric: str = "loss"
    """What decides which step is best, for checkpoint.keep_best and early_stopping_patience: loss, perplexity, one of
    evaluation.metrics (a function by its own name), unfinished or answer_tokens."""

    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more of best_metric is better. auto: less of loss, perplexity, unfinished and answer_tokens, more
    of all others."""

    early_stopping_patience: Count | None = None
    """Stop the run once so many evaluations in a row brought no better best_metric."""

    early_stopping_min_delta: NotNegative = 0.0
    """What counts as better for early stopping: by more than this."""

    watch: str | None = None
    """File, folder, glob or hub name of rows that must not be forgotten, such as general text or an earlier task. Their
    loss is measured before the first step, during the run and at its end: watch_loss, and its rise, watch_drift. The
    format is recognised by the keys."""

    watch_interval: Count | None = None
    """Measure the watched rows every so many optimizer steps. Default: at the end of each epoch."""

    watch_limit: Positive | None = None
    """Stop the run once the loss on the watched rows has risen by more than this, in nats per token: 0.1 is 10.5 % more
    perplexity, whatever the model. The last step found within it becomes the final model, so each look that finds the
    run within it saves a checkpoint."""


def expanded(names: Sequence[str]) -> list[str]:
    """The names of metrics with groups written out, each once."""
    return list(dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,))))


def is_own_function(name: str) -> bool:
    """Whether this names a function of the user's rather than a metric of ours."""
    return name not in (*TEXT_METRICS, *GROUPS, *MEASURED_ANYWAY) and OWN_FUNCTION.fullmatch(name) is not None


def own_name(path: str) -> str:
    """What a function of the user's is called in results: its last word."""
    return re.split(r"[.:]", path)[-1]


def lower_is_better(evaluation: Evaluation) -> bool:
    """Whether less of best_metric is better."""
    if evaluation.best_mode == "auto":
        return evaluation.best_metric in LOWER_IS_BETTER
    return evaluation.best_mode == "min"


def rows_generated(evaluation: Evaluation) -> int:
    """How many validation rows are to be answered; 0 for none."""
    return ROWS_GENERATED if evaluation.generate is True else int(evaluation.generate)


def names_of(evaluation: Evaluation) -> list[str]:
    """Everything that best_metric may name."""
    if not evaluation.generate:
        return [*MEASURED_ANYWAY]
    own = [own_name(name) if is_own_function(name) else name for name in expanded(evaluation.metrics)]
    return list(dict.fromkeys([*MEASURED_ANYWAY, *own, *ALWAYS]))


def metric_problems(names: Sequence[str]) -> Iterator[str]:
    """What is wrong with names of metrics."""
    known = (*TEXT_METRICS, *GROUPS, *MEASURED_ANYWAY)
    for name in names:
        if name not in known and not is_own_function(name):
            near = difflib.get_close_matches(name.lower(), [each.lower() for each in known], n=1)
            meant = next((each for each in known if near and each.lower() == near[0]), None)
            hint = f" Did you mean {meant}?" if meant else ""
            yield (
                f"found {name!r}; known: {', '.join(known)}, or a function of your own as package.module:function or "
                f"file.py:function.{hint}"
            )
    shown = [own_name(name) for name in names if is_own_function(name)]
    for name in {name for name in shown if shown.count(name) > 1 or name in (*known, *ALWAYS)}:
        yield f"two metrics would be called {name!r}. Rename one of the functions."


def needs_validation(recipe: Recipe) -> Iterator[tuple[str, object]]:
    """(path, value) of each setting that does nothing without validation rows."""
    asked = recipe.evaluation
    for path, value in (
        ("data.validation_samples", recipe.data.validation_samples),
        ("checkpoint.keep_best", recipe.checkpoint.keep_best),
        ("evaluation.interval", asked.interval),
        ("evaluation.generate", asked.generate),
        ("evaluation.early_stopping_patience", asked.early_stopping_patience),
    ):
        if value:
            yield path, value
