"""The names under which trackers (TensorBoard, Weights & Biases, MLflow) show a step."""

from __future__ import annotations

from training_hub.types import StepReport


def series(report: StepReport) -> dict[str, float]:
    """The numbers of a step by tracker name, grouped by a slash; step 0 has a validation only."""
    numbers: dict[str, float] = {}
    if report.step > 0:
        numbers = {
            "train/loss": report.loss,
            "train/learning_rate": report.learning_rate,
            "train/grad_norm": report.grad_norm,
            "train/epoch": report.epoch,
            "train/trained_tokens": float(report.trained_tokens),
            "speed/tokens_per_second": report.tokens_per_second,
            "speed/trained_tokens_per_second": report.trained_tokens_per_second,
            "speed/step_seconds": report.step_seconds,
            "speed/memory_gib": report.memory_gib,
        }
        if report.peak_fraction is not None:
            numbers["speed/peak_fraction"] = report.peak_fraction
        numbers |= {f"train/{name}": value for name, value in report.measures.items()}
    if report.validation_loss is not None:
        numbers["validation/loss"] = report.validation_loss
    if report.validation_perplexity is not None:
        numbers["validation/perplexity"] = report.validation_perplexity
    return numbers | {f"validation/{name}": value for name, value in report.scores.items()}
