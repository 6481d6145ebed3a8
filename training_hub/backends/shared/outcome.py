"""What a run came to: its last metrics, which step its model is of, and what is told of it to others."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from training_hub.backends.shared.watch import Watch
from training_hub.data.feed import Feed
from training_hub.data.store import TokenStore
from training_hub.evaluation.best import Best
from training_hub.evaluation.metrics import perplexity
from training_hub.evaluation.predictions import FILE_NAME as PREDICTIONS
from training_hub.monitoring.base_model import read_base
from training_hub.monitoring.card import CardFacts, card_files
from training_hub.monitoring.jsonl import read_metrics
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder

VERSIONS_OF = ("transformers", "tokenizers", "safetensors", "numpy", "training-hub")
LIBRARIES: Mapping[str, tuple[str, ...]] = {"torch": ("torch",), "jax": ("jax", "jaxlib", "optax")}
"""Packages of each engine that decide numbers."""


class Ended(Protocol):
    """A run of an engine, as far as its outcome is told from it.

    exam: what asks for answers; scale: what operations are measured by; None where there is none. stop_reason: why a
    callback ended it.
    """

    engine: str
    step: int
    stop_reason: str
    best: Best
    validation_before: float | None

    @property
    def recipe(self) -> Recipe: ...

    @property
    def feed(self) -> Feed: ...

    @property
    def validation(self) -> TokenStore | None: ...

    @property
    def watch(self) -> Watch | None: ...

    @property
    def exam(self) -> Any: ...

    @property
    def scale(self) -> Any: ...


def final_step(run: Ended) -> int:
    """The step that the final model is of."""
    if run.watch is not None and run.watch.reason:
        return run.watch.kept or 0
    best = run.best.step if run.recipe.checkpoint.keep_best else None
    return run.step if best is None else best


def early_end(run: Ended) -> str:
    """Why the run ended before its last step, for want of a better evaluation or by a callback; "" where it did not."""
    return run.best.reason or run.stop_reason if run.step < run.feed.total_steps else ""


def data_facts(run: Ended) -> dict[str, Any]:
    """Counts of the rows, and a sha256 of the tokens and weights that were trained on."""
    store, validation = run.feed.store, run.validation
    return {
        "samples": len(store),
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained_tokens.sum()),
        "validation_samples": 0 if validation is None else len(validation),
        "fingerprint": store.fingerprint,
    }


def told(run: Ended, folder: RunFolder) -> dict[str, Any]:
    """What the result says of the base model, the rows and the answers."""
    base = read_base(run.recipe.model.path, run.recipe.model.revision)
    predictions = folder.path / PREDICTIONS
    return {
        "base": {"name": base.name, "licence": base.licence or ""},
        "data": data_facts(run),
        "predictions": predictions if run.exam is not None and predictions.is_file() else None,
    }


def card_of(run: Ended, folder: RunFolder, dtype: str, parameters: int, trained: int) -> dict[str, bytes]:
    """The files of the final model's card, by name. dtype: of its numbers; parameters, trained: how many."""
    history = tuple(read_metrics(folder.metrics))
    predictions = folder.path / PREDICTIONS
    rows = predictions.read_text(encoding="utf-8").splitlines() if run.exam is not None else []
    facts = CardFacts(
        recipe=run.recipe,
        base=read_base(run.recipe.model.path, run.recipe.model.revision),
        step=final_step(run),
        metrics=metrics_of_model(run, history),
        history=history,
        data=data_facts(run),
        versions=versions(run.engine),
        parameters=parameters,
        trained_parameters=trained,
        dtype=dtype,
        samples=[json.loads(row) for row in rows],
    )
    return card_files(facts)


def metrics_of_model(run: Ended, history: tuple[dict[str, Any], ...]) -> dict[str, float]:
    """The final metrics, with those of validation taken at the last evaluation of the step that the model is of."""
    metrics, step = final_metrics(run, history), final_step(run)
    taken = [row for row in history if row["step"] <= step and row.get("validation_loss") is not None]
    measured = {key: value for key, value in (taken[-1] if taken else {}).items() if key.startswith("validation_")}
    return {**metrics, **{key: value for key, value in measured.items() if value is not None}}


def final_metrics(run: Ended, history: tuple[dict[str, Any], ...]) -> dict[str, float]:
    """The last values, and rates over the whole history."""
    if not history:
        return {}
    seconds = sum(row["step_seconds"] for row in history)
    metrics = {
        "loss": history[-1]["loss"],
        "steps": history[-1]["step"],
        "epochs": history[-1]["epoch"],
        "tokens": sum(row["tokens"] for row in history),
        "trained_tokens": sum(row["trained_tokens"] for row in history),
        "tokens_per_second": sum(row["tokens"] for row in history) / max(seconds, 1e-9),
        "trained_tokens_per_second": sum(row["trained_tokens"] for row in history) / max(seconds, 1e-9),
        "memory_gib": max((row["memory_gib"] for row in history if row["memory_gib"] is not None), default=math.nan),
    }
    shares = [row["peak_fraction"] * row["step_seconds"] for row in history if "peak_fraction" in row]
    if run.scale is not None and len(shares) == len(history):
        metrics["peak_fraction"] = sum(shares) / max(seconds, 1e-9)
        metrics["peak_tflops"] = run.scale.peak / 1e12
    if run.validation_before is not None:
        metrics["validation_loss_before"] = run.validation_before
    measured = [row["validation_loss"] for row in history if row.get("validation_loss") is not None]
    if measured:
        metrics["validation_loss"] = measured[-1]
        metrics["validation_perplexity"] = perplexity(measured[-1])
    if run.watch is not None:
        metrics |= run.watch.metrics()
    if run.exam is not None:
        metrics |= run.exam.metrics()
    if run.best.value is not None and run.best.step is not None:
        metrics[f"best_validation_{run.best.settings.best_metric}"] = run.best.value
        metrics["best_step"] = run.best.step
    return metrics


def versions(engine: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in (*VERSIONS_OF, *LIBRARIES[engine]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # training_hub run from its source folder is not an installed package
            found[name] = "not installed as a package"
    return found
