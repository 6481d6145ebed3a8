"""Two processes have the numbers of one, stop together, go on as one and back, and say what ended them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from tests.backends.jax_engine.tiny import losses, saved
from tests.invariants.run import recipe, train
from tests.workers import acting_at, workers
from training_hub import evaluate
from training_hub.backends.jax_engine.processes import _meeting_place
from training_hub.errors import DataError, Interrupted, LaunchError, TrainingError
from training_hub.folders import damage
from training_hub.launch import run

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")

TWO = {"procs": 2}
DIVIDED = {"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": -1}
ASKED: dict[str, Any] = {
    "backend": "jax",
    "training": {"steps": 6, "preflight": False, "max_tokens_per_gpu": 256, "activation_checkpointing": "none"},
    "checkpoint": {"interval": 3, "final": False},
    "parallelism": DIVIDED,
}


@pytest.fixture(scope="module")
def one_layer(tiny_model_folder, tmp_path_factory) -> Path:
    """A model that each process compiles quickly."""
    folder, tokenizer = tmp_path_factory.mktemp("one-layer"), AutoTokenizer.from_pretrained(tiny_model_folder)
    saved("llama", folder, vocab_size=len(tokenizer), initializer_range=0.02, num_hidden_layers=1)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(one_layer, chat_file, tmp_path_factory):
    return train(one_layer, chat_file, tmp_path_factory.mktemp("one") / "run", **ASKED)


@pytest.fixture(scope="module")
def stopped(one_layer, chat_file, tmp_path_factory):
    """A run in two processes, one of which got a SIGTERM as the third step was saved: its folder, and the error."""
    output = tmp_path_factory.mktemp("two") / "run"
    third = output / "checkpoints" / "step-3"
    with acting_at(third, lambda: os.kill(workers()[1], signal.SIGTERM)), pytest.raises(Interrupted) as caught:
        run(recipe(one_layer, chat_file, output, processes=TWO, **ASKED))
    return output, caught.value


def test_a_signal_to_one_process_stops_both_after_the_same_step(stopped):
    output, error = stopped
    saved = sorted(int(folder.name[5:]) for folder in (output / "checkpoints").iterdir())
    assert error.signal_number == signal.SIGTERM and f"after step {saved[-1]} of 6" in str(error)
    assert 3 <= saved[-1] < 6 and not workers()
    assert not [line for step in saved for line in damage(output / "checkpoints" / f"step-{step}")]


def test_two_processes_have_the_numbers_of_one_which_goes_on_from_their_checkpoint(
    stopped, unbroken, one_layer, chat_file
):
    """All losses to 1e-5 in float32: sums are in another order."""
    resumed = train(one_layer, chat_file, stopped[0], **ASKED)
    assert resumed.status == "finished" and resumed.plan["processes"] == 1
    assert np.abs(losses(resumed) - losses(unbroken)).max() <= 1e-5


def test_processes_meet_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4321")
    assert _meeting_place(0) == ("127.0.0.1:4321", "127.0.0.1:4321"), "on one machine nobody else is to hear"
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert _meeting_place(0) == ("node0:4321", None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(LaunchError, match=r"cannot meet at MASTER_PORT.*nproc_per_node"):
        _meeting_place(0)


@pytest.mark.slow
def test_two_processes_prove_train_and_save_as_one_does(one_layer, chat_file, tmp_path):
    """With proofs, validation, a watch, the best step kept: losses, measures and weights to 1e-5. Then two go on from
    what one saved, each with one half of the tokens of a pack."""
    more = {
        **ASKED,
        "training": {**ASKED["training"], "preflight": True},
        "data": {"validation_fraction": 0.1},
        "evaluation": {"watch": str(chat_file), "watch_interval": 3, "interval": 2},
        "checkpoint": {"interval": 4, "keep_best": True},
    }
    one = train(one_layer, chat_file, tmp_path / "one", **more)
    two = train(one_layer, chat_file, tmp_path / "two", processes=TWO, **more)
    assert len(two.history) == 6 and two.plan["processes"] == 2 and two.plan["devices"]["fsdp"] == 2
    assert np.abs(losses(two) - losses(one)).max() <= 1e-5
    for name in ("validation_loss", "watch_loss", "best_validation_loss", "best_step"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], abs=1e-5), name
    assert (tmp_path / "two" / "preflight.json").exists()
    ours, theirs = (load_file(each.model_path / "model.safetensors") for each in (two, one))
    assert max(np.abs(ours[name] - theirs[name]).max() for name in theirs) <= 1e-5

    def stop(report) -> None:
        if report.step == 5:
            raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError):
        train(one_layer, chat_file, tmp_path / "begun", [stop], **more)
    more["parallelism"] = {"data_parallel_replicate_degree": 1, "context_parallel_degree": 2}
    resumed = train(one_layer, chat_file, tmp_path / "begun", processes=TWO, **more)
    assert resumed.plan["devices"]["sp"] == 2
    assert np.abs(losses(resumed) - losses(one)).max() <= 1e-5


@pytest.mark.slow
def test_protected_weights_are_those_of_one_process(one_layer, chat_file, tmp_path):
    """All losses to 1e-5 in float32."""
    more = {**ASKED, "algorithm": "osft", "checkpoint": {"interval": None}, "osft": {"unfreeze_rank_ratio": 0.3}}
    one = train(one_layer, chat_file, tmp_path / "one", **more)
    two = train(one_layer, chat_file, tmp_path / "two", processes=TWO, **more)
    assert np.abs(losses(two) - losses(one)).max() <= 1e-5


@pytest.mark.slow
def test_an_error_of_one_process_is_told_in_the_caller(one_layer, chat_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": 1}\n')
    with pytest.raises(DataError, match=r"line 1: no known format(.|\n)*rank 0 of 2"):
        run(recipe(one_layer, rows, tmp_path / "run", processes=TWO, **ASKED))


@pytest.fixture(scope="module")
def taught(one_layer, chat_file, tmp_path_factory):
    """A model that has learned so much that its answers end."""
    settings = {"training": {"steps": 40, "preflight": False}, "optimizer": {"lr": 1e-2}}
    return train(one_layer, chat_file, tmp_path_factory.mktemp("taught") / "run", **settings).model_path


QUIET = {"monitoring.console": "off", "model.dtype": "float32", "data.cache": False}
DRAWN = {"temperature": 0.8, "top_p": 0.9, "batch_tokens": 600, "seed": 3}


def same_scores(model: Path, file: Path, layout: dict[str, Any], **asked: Any) -> Any:
    """The scores and answers of one process, which two find: a loss to 1e-5, since sums are in another order."""
    alone = evaluate(model, file, ["exact_match", "f1"], backend="jax", overrides=QUIET, **asked)
    more = {**QUIET, **layout}
    both = evaluate(model, file, ["exact_match", "f1"], backend="jax", nproc_per_node=2, overrides=more, **asked)
    assert both.predictions == alone.predictions
    assert list(both.scores) == list(alone.scores)
    for name, scores in alone.scores.items():
        assert both.scores[name] == pytest.approx(scores, rel=1e-5)
    return alone


@pytest.mark.slow
def test_two_processes_find_the_scores_and_the_answers_of_one(taught, chat_file):
    alone = same_scores(taught, chat_file, {}, rows=7)
    assert len(alone.predictions) == 7 and alone.scores["final"]["unfinished"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": -1}, {"tensor_parallel_degree": 2}]
)
def test_so_they_do_of_a_divided_model_and_of_what_is_drawn(layout, taught, chat_file):
    divided = {f"parallelism.{name}": value for name, value in layout.items()}
    alone = same_scores(taught, chat_file, divided, rows=12, **DRAWN)
    assert len({row["final"]["answer"] for row in alone.predictions}) > 3


@pytest.mark.slow
def test_two_processes_answer_during_a_run_as_one_does(one_layer, chat_file, tmp_path):
    more = {
        **ASKED,
        "training": {**ASKED["training"], "steps": 4},
        "optimizer": {"lr": 1e-2},
        "data": {"validation_fraction": 0.1},
        "evaluation": {"generate": 3, "interval": 2},
    }
    one = train(one_layer, chat_file, tmp_path / "one", **more)
    two = train(one_layer, chat_file, tmp_path / "two", processes=TWO, **more)
    assert np.abs(losses(two) - losses(one)).max() <= 1e-5
    mine, theirs = (folder / "predictions.jsonl" for folder in (tmp_path / "two", tmp_path / "one"))
    assert mine.read_text() == theirs.read_text() and len(mine.read_text().splitlines()) == 3
    for name, value in one.metrics.items():
        if name.startswith("validation_"):
            assert two.metrics[name] == pytest.approx(value, abs=1e-5), name
