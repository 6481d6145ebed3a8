"""`evaluate(...)`: saved models on rows, from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training_hub.frontends.dialects import is_live, recipe_from
from training_hub.recipe.load import Layer, layer_of, merge

if TYPE_CHECKING:
    from training_hub.experiments.comparison import EvaluationResult

Model = str | os.PathLike[str]
Metric = str | Callable[..., Any]


def evaluate(
    model: Model | Sequence[Model],
    data: Any,
    metrics: Sequence[Metric] | Metric = ("exact_match",),
    output: str | os.PathLike[str] | None = None,
    rows: int | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    backend: str | None = None,
    nproc_per_node: int | str | None = None,
) -> EvaluationResult:
    """Let saved models answer rows, and compare what they say with what the rows say.

    model: a model folder, a name on the hub, or several, which then stand side by side.
    data: file, folder, glob or hub name in any format that is trained on, or rows in memory. The last assistant turn of
        a conversation, or the completion, is the reference.
    metrics: exact_match, normalized_match, accuracy, f1, bleu, chrf, rouge (rouge1, rouge2, rougeL), functions called
        with (answer, reference), or their paths, package.module:function or file.py:function. With only loss and
        perplexity, which are measured anyway, nothing is generated.
    output: folder for evaluation.json and predictions.jsonl; without it nothing is written.
    rows: answer so many, spread over the data; without it all.
    max_new_tokens, batch_tokens, temperature, top_p, seed: as in the recipe's section `evaluation`.
    overrides: any setting of the recipe by its path, {"data.chat_template": "chatml"}.
    backend: the engine that loads and asks the models, as the recipe's `backend`.
    nproc_per_node: so many processes share the rows out, or each model, as the section `parallelism` says; "auto" or
        "gpu": one for each GPU. Under torchrun, those that it started do.

    Returns an EvaluationResult: `scores[model][metric]`, where a model is named by the end of its path, and
    `predictions`. Raises RecipeError or DataError listing what is wrong before a weight is loaded.
    """
    from pathlib import Path

    from training_hub.backends import Given
    from training_hub.experiments.comparison import compare, generates
    from training_hub.launch import is_first
    from training_hub.monitoring.console import open_console

    models = [os.fspath(one) for one in ([model] if isinstance(model, str | os.PathLike) else model)]
    listed = [metrics] if isinstance(metrics, str) or callable(metrics) else list(metrics)
    names = [one for one in listed if isinstance(one, str)]
    own = [one for one in listed if not isinstance(one, str)]
    live = is_live(data)
    settings = {
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    answered = True if rows is None else rows
    layer = merge(
        layer_of(overrides, "overrides"),
        Layer(
            {
                "model.path": models[0] if models else None,
                "output": "(none)" if output is None else os.fspath(output),
                **({} if live else {"data.path": data}),
                **({"evaluation.generate": answered, "evaluation.metrics": names} if generates(names, own) else {}),
                **{f"evaluation.{name}": value for name, value in settings.items() if value is not None},
                **({} if seed is None else {"seed": seed}),
                **({} if backend is None else {"backend": backend}),
                **({} if nproc_per_node is None else {"processes.procs": nproc_per_node}),
            },
            {"processes.procs": "nproc_per_node"},
        ),
    )
    recipe = recipe_from(
        layer, algorithm="sft", backend="torch", live=("data.validation", *(["data.path"] if live else []))
    )
    console = open_console(recipe.monitoring.console if is_first(recipe) else "off")
    place = None if output is None else Path(output)
    return compare(recipe, models, Given(rows=data if live else None), console, place, own)
