"""The section `loss` in whole runs: cutting a step and stopping a run change nothing, validation stays comparable."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.invariants.run import final_weights, train
from training_hub.errors import TrainingError

EVERYTHING: dict[str, Any] = {
    "loss": {"label_smoothing": 0.1, "z_loss": 1e-3, "dft": True, "neftune_noise_alpha": 5},
    "optimizer": {"name": "SGD", "lr": 0.1},
}


def stop_at_three(report: Any) -> None:
    if report.step == 3:
        raise TrainingError("stopped by the test")


@pytest.fixture(scope="module")
def whole(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("loss") / "whole", **EVERYTHING)


def test_one_times_eight_equals_eight_times_one(tiny_model_folder, chat_file, tmp_path, whole):
    parts = train(tiny_model_folder, chat_file, tmp_path / "parts", **EVERYTHING, data={"packing": False})
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    # float32 sums in another order, as in test_batches.
    for name, tensor in final_weights(whole).items():
        assert float((tensor - final_weights(parts)[name]).abs().max()) < 1e-6


def test_stopped_and_resumed_is_unbroken_bit_for_bit(tiny_model_folder, chat_file, tmp_path, whole):
    every = {"checkpoint": {"interval": 1}}
    with pytest.raises(TrainingError, match="stopped by the test"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [stop_at_three], **EVERYTHING, **every)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **EVERYTHING, **every)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    assert all(torch.equal(tensor, final_weights(resumed)[name]) for name, tensor in final_weights(whole).items())


def test_validation_is_plain_cross_entropy_whatever_is_minimised(tiny_model_folder, chat_file, tmp_path):
    rows = {"data": {"validation": str(chat_file)}, "training": {"steps": 1}}
    plain = train(tiny_model_folder, chat_file, tmp_path / "plain", **rows)
    other = train(tiny_model_folder, chat_file, tmp_path / "other", **rows, loss=EVERYTHING["loss"])
    assert plain.metrics["validation_loss_before"] == other.metrics["validation_loss_before"]
    assert plain.history[0]["loss"] != pytest.approx(other.history[0]["loss"], rel=1e-2)


def test_the_losses_of_the_sources_add_up_to_the_loss_of_the_step(tiny_model_folder, chat_file, tmp_path):
    lines = chat_file.read_text().splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[:20]), ("b.jsonl", lines[20:])):
        (tmp_path / name).write_text("".join(part))
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    names = ("source_loss/a.jsonl", "source_loss/b.jsonl")
    result = train(
        tiny_model_folder, chat_file, tmp_path / "run", data={"path": both}, training={"global_batch_size": 64}
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    alone = [
        train(
            tiny_model_folder, tmp_path / path[-7:], tmp_path / f"run-{path[-7]}", training={"global_batch_size": 64}
        ).history[0]
        for path in both
    ]
    for name, own in zip(names, alone, strict=True):
        assert row[name] == pytest.approx(own["loss"], rel=1e-6)
    shares = [own["trained_tokens"] / row["trained_tokens"] for own in alone]
    assert sum(shares) == 1
    assert row["loss"] == pytest.approx(sum(share * row[name] for share, name in zip(shares, names, strict=True)))
    quiet = train(
        tiny_model_folder, chat_file, tmp_path / "quiet", data={"path": both}, loss={"by_source": False},
        training={"global_batch_size": 64},
    )  # fmt: skip
    assert not any(key.startswith("source_loss") for key in quiet.history[0])
    assert quiet.history[0]["loss"] == result.history[0]["loss"]
