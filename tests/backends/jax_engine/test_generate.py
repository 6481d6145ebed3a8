"""Answers by JAX: greedy ones token for token those of transformers, drawn ones as likely as said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.backends.jax_engine.tiny import forward, read, saved
from tests.invariants.run import recipe, train
from training_hub.backends import Given, Speaker
from training_hub.backends.jax_engine import generate
from training_hub.backends.jax_engine.engine import JaxEngine
from training_hub.backends.jax_engine.generate import Speech
from training_hub.backends.shared.answers import Decoding, Prompt
from training_hub.backends.shared.materials import Limits
from training_hub.backends.torch_engine.answers.generate import answers
from training_hub.backends.torch_engine.engine import TorchEngine
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.types import Message

LENGTHS = (3, 37, 11, 5, 11)
LIMITS = (9, 4, 9, 7, 9)


def prompts() -> list[Prompt]:
    random = np.random.default_rng(1)
    rows = [random.integers(3, 128, length).tolist() for length in LENGTHS]
    return [Prompt(ids, limit) for ids, limit in zip(rows, LIMITS, strict=True)]


def speech(folder: Path) -> tuple[Speech, tuple[Any, Any]]:
    shape, loaded = read(folder)
    weights = {key: jnp.asarray(weight) for key, weight in loaded.weights.items()}
    return Speech(forward(shape), Limits(shape.vocabulary, None, False)), (weights, {})


@pytest.mark.parametrize(
    "family", ["mistral", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "gemma", "qwen3-moe"))]
)
def test_the_likeliest_tokens_are_those_of_transformers(family, tmp_path, monkeypatch):
    """In float32, with prompts of several lengths side by side, one of them read in parts, and a sliding window."""
    monkeypatch.setattr(generate, "MOST_AT_ONCE", 16)
    model = saved(family, tmp_path)
    made, weights = speech(tmp_path)
    first = answers(model, prompts(), Decoding(()))
    stops = (first[0].ids[4], first[2].ids[1])
    for stop_ids in ((), stops):
        wanted = answers(model, prompts(), Decoding(stop_ids))
        told = []
        found = made.answers(weights, prompts(), Decoding(stop_ids), advance=told.append)
        assert found == wanted
        assert sum(told) == len(LENGTHS)
    assert {one.finish_reason for one in wanted} == {"stop", "length"}


def test_tokens_are_drawn_as_often_as_they_are_likely_among_the_likeliest():
    """4,000 draws: each share within five standard errors; what top_p leaves out is never drawn."""
    random = np.random.default_rng(0)
    logits = random.standard_normal(12).astype(np.float32) * 2
    likely = np.exp(logits / 0.8 - np.max(logits / 0.8))
    likely /= likely.sum()
    order = np.argsort(-likely)
    kept = order[: int(np.searchsorted(np.cumsum(likely[order]), 0.9)) + 1]
    wanted = np.zeros(12)
    wanted[kept] = likely[kept] / likely[kept].sum()
    draws = generate._draws(Decoding((), seed=3), range(4000))
    many = jnp.broadcast_to(jnp.asarray(logits), (4000, 12))
    drawn = np.asarray(generate._choose(many, draws, jnp.zeros(4000, jnp.int32), 0.8, 0.9))
    shares = np.bincount(drawn, minlength=12) / 4000
    assert (np.abs(shares - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 4000)).all()
    assert len(kept) < 12 and shares[wanted == 0].sum() == 0


def test_what_is_drawn_follows_from_seed_and_number_not_from_company(tmp_path):
    saved("llama", tmp_path, num_hidden_layers=1)
    made, weights = speech(tmp_path)
    asked, drawing = prompts(), Decoding((), temperature=1.0, seed=1)
    together = made.answers(weights, asked, drawing)
    assert made.answers(weights, asked, drawing, tokens_at_once=32) == together
    assert made.answers(weights, asked, Decoding((), temperature=1.0, seed=2)) != together
    heard: list[int] = []
    (alone,) = made.together(weights, asked[:1], drawing, [0], lambda tokens, goes_on: heard.append(int(tokens[0])))
    assert alone == together[0] and heard == list(alone.ids)


def test_a_saved_model_says_what_it_says_by_the_torch_engine(tiny_model_folder):
    """The same text in the same pieces, in float32."""
    asked = Recipe.model_validate(
        {"model": {"path": str(tiny_model_folder), "dtype": "float32"}, "data": {"path": "-"}, "output": "-"}
    )
    replies = []
    for engine in (JaxEngine(), TorchEngine()):
        assert isinstance(engine, Speaker)
        voice, heard = engine.voice(asked), []
        reply = voice.reply([Message("user", "What comes after 3?")], heard.append, max_new_tokens=12)
        assert "".join(heard) == reply.text and voice.has_template
        replies.append((reply.text, heard, reply.finish_reason, reply.tokens))
    assert replies[0] == replies[1]


@pytest.mark.slow
def test_a_run_answers_as_by_the_torch_engine_and_learns_as_if_it_did_not(tiny_model_folder, chat_file, tmp_path):
    """Before training every answer is the same, in float32; with and without answers every loss is the same."""
    asked: dict[str, Any] = {
        "data": {"validation": str(chat_file)}, "training": {"steps": 6, "preflight": False},
        "evaluation": {"generate": 5, "metrics": ["exact_match", "chrf"], "interval": 3, "max_new_tokens": 12},
        "checkpoint": {"interval": 3},
    }  # fmt: skip
    ours, theirs = (
        train(tiny_model_folder, chat_file, tmp_path / name, backend=name, **asked) for name in ("jax", "torch")
    )
    before = [(one.output_dir / "predictions" / "step-0.jsonl").read_text() for one in (ours, theirs)]
    assert before[0] == before[1] and before[0].count("\n") == 5
    names = {name for name in theirs.metrics if name.startswith("validation_")}
    assert names == {name for name in ours.metrics if name.startswith("validation_")}
    assert "validation_chrf_before" in names and ours.predictions is not None
    row = json.loads(ours.predictions.read_text().splitlines()[0])
    assert row["step"] == 6 and {"base", "tuned"} <= row.keys()
    quiet = {**asked, "evaluation": {"interval": 3}}
    without = train(tiny_model_folder, chat_file, tmp_path / "without", backend="jax", **quiet)
    assert [row["loss"] for row in without.history] == [row["loss"] for row in ours.history]


@pytest.mark.slow
def test_a_saved_model_is_examined_and_scored_as_by_the_torch_engine(tiny_model_folder, chat_file, tmp_path):
    """Scores and answers; the loss to 1e-5, in float32."""
    asked = recipe(
        tiny_model_folder, chat_file, tmp_path / "out",
        evaluation={"generate": 6, "metrics": ["f1"], "max_new_tokens": 10}, data={"validation_fraction": 0.5},
    )  # fmt: skip
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"validation_fraction": 0.0})})
    ours, theirs = (engine.examine(asked, Given(), open_console("off")) for engine in (JaxEngine(), TorchEngine()))
    assert ours.predictions == theirs.predictions and len(ours.predictions) == 6
    assert ours.scores == pytest.approx(theirs.scores, rel=1e-5)
    one, other = (engine.score(asked, open_console("off"), generates=True) for engine in (JaxEngine(), TorchEngine()))
    assert one == pytest.approx(other, rel=1e-5) and "exact_match" in one
