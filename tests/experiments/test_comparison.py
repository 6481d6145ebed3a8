"""Saved models side by side: the scores are those of the answers, whichever way in, and the files hold them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.run import train
from training_hub import evaluate
from training_hub.errors import DataError, RecipeError
from training_hub.evaluation.texts import Texts, bleu, token_f1
from training_hub.experiments.comparison import names_of
from training_hub.frontends.cli import main
from training_hub.monitoring.base_model import front_matter

QUIET = {"monitoring.console": "off", "model.dtype": "float32", "data.cache": False}
QUIET_FLAGS = ["--monitoring.console", "off", "--model.dtype", "float32", "--no-data.cache"]


@pytest.fixture(scope="module")
def taught(tiny_model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained for long enough that it gets some rows right and others wrong."""
    output = tmp_path_factory.mktemp("taught") / "run"
    settings = {"training": {"steps": 150, "global_batch_size": 16, "preflight": False}, "optimizer": {"lr": 1e-2}}
    result = train(tiny_model_folder, chat_file, output, **settings)
    assert result.model_path is not None
    return result.model_path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which a fourth have an answer that no model would give."""
    path = tmp_path_factory.mktemp("rows") / "test.jsonl"
    turns = [(f"What comes after {n}?", f"{n + 1}." if n % 4 else "a goose") for n in range(24)]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_models_stand_side_by_side_with_scores_of_what_they_said(
    tiny_model_folder: Path, taught: Path, rows: Path, tmp_path: Path
):
    found = evaluate(
        [tiny_model_folder, taught], rows, ["exact_match", "f1", "bleu"], output=tmp_path / "eval", overrides=QUIET
    )
    base, tuned = found.scores["model"], found.scores["final"]
    assert 0 < tuned["exact_match"] < 1 and base["exact_match"] == 0 and tuned["loss"] < base["loss"]
    assert tuned["rows"] == 24 and base["unfinished"] > tuned["unfinished"]
    said = [row["final"]["answer"] for row in found.predictions]
    wanted = [json.loads(line)["messages"][1]["content"] for line in rows.read_text().splitlines()]
    assert [row["reference"] for row in found.predictions] == wanted
    assert tuned["f1"] == pytest.approx(token_f1(Texts(said, wanted))[0])
    assert tuned["bleu"] == pytest.approx(bleu(Texts(said, wanted))[0])
    written = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert written["models"]["final"] == {"path": str(taught), "scores": tuned}
    lines = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert lines == found.predictions


def test_the_command_says_what_the_function_gives(
    tiny_model_folder: Path, taught: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = ["eval", "--model", str(tiny_model_folder), "--model", str(taught), "--data", str(rows), *QUIET_FLAGS]
    more = ["--metrics", "exact_match,f1", "--rows", "10", "--max-new-tokens", "9", "--output", str(tmp_path / "eval")]
    assert main([*asked, *more, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = evaluate(
        [tiny_model_folder, taught], rows, ["exact_match", "f1"], rows=10, max_new_tokens=9, overrides=QUIET
    )
    assert printed == found.scores and printed["final"]["rows"] == 10
    assert main([*asked, *more]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "final", "change"]
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(shown) == list(found.scores["final"])
    assert float(shown["f1"][1]) == pytest.approx(found.scores["final"]["f1"], rel=1e-3)
    assert float(shown["loss"][2]) < 0


def test_a_recipe_of_a_run_says_what_is_asked_and_flags_win(
    taught: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: elsewhere, dtype: float32}}\ndata: {{path: {rows}, validation_fraction: 0.5, cache: false}}\n"
        "evaluation: {generate: 6, metrics: [f1], max_new_tokens: 5}\nmonitoring: {console: 'off'}\n"
    )
    assert main(["eval", "--config", str(config), "--model", str(taught), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["final"]
    assert "f1" in scores and "exact_match" not in scores and scores["rows"] == 6
    assert main(["eval", "--config", str(config), "--model", str(taught), "--json", "--rows", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["final"]["rows"] == 7


def test_loss_and_perplexity_alone_generate_nothing(taught: Path, tmp_path: Path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "What comes after 4?"}\n' * 3)  # which asks nothing
    scores = evaluate(taught, text, ["perplexity"], overrides=QUIET).scores["final"]
    assert list(scores) == ["rows", "loss", "perplexity"]
    with pytest.raises(DataError, match="nothing in these rows asks"):
        evaluate(taught, text, overrides=QUIET)


def test_the_engine_is_the_one_that_is_named(taught: Path, rows: Path):
    pytest.importorskip("jax")
    with pytest.raises(RecipeError, match="Write nproc_per_node=1"):
        evaluate(taught, rows, nproc_per_node=0, overrides=QUIET)
    with pytest.raises(RecipeError, match="jax"):
        evaluate(taught, rows, backend="jaxx", overrides=QUIET)


@pytest.mark.slow
def test_either_engine_finds_the_same(taught: Path, rows: Path):
    """Answers of the same tokens; the loss to 1e-5, in float32."""
    pytest.importorskip("jax")
    ours, theirs = (evaluate(taught, rows, "f1", rows=6, backend=one, overrides=QUIET) for one in ("torch", "jax"))
    assert ours.predictions == theirs.predictions
    assert ours.scores["final"] == pytest.approx(theirs.scores["final"], rel=1e-5)


def test_functions_and_rows_in_memory_are_taken_as_they_are(taught: Path):
    asked: list[str] = []

    def long_enough(answer: str, reference: str, prompt: str) -> bool:
        asked.append(prompt)
        return len(answer) >= len(reference)

    rows: Any = [{"prompt": "What comes after 4?", "completion": " 5."}, {"prompt": "And 7?", "completion": " 8."}]
    found = evaluate(taught, rows, [long_enough, "f1"], overrides=QUIET)
    assert list(found.scores["final"])[-2:] == ["unfinished", "answer_tokens"]
    assert {"long_enough", "f1"} <= set(found.scores["final"]) and asked == ["What comes after 4?", "And 7?"]


def test_an_error_of_a_function_names_the_row(taught: Path, rows: Path):
    def picky(answer: str, reference: str) -> float:
        return 1 / (reference != "a goose")

    with pytest.raises(DataError) as caught:
        evaluate(taught, rows, picky, overrides=QUIET)
    assert "test.jsonl line 1: ZeroDivisionError" in caught.value.problems[0]
    assert caught.value.problems[-1] == "and 1 more problems"


def test_what_is_wrong_with_any_model_is_said_before_one_is_loaded(taught: Path, rows: Path, tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        evaluate([taught, tmp_path / "nowhere", tmp_path], rows, output=taught.parent, overrides=QUIET)
    text = str(caught.value)
    assert "nowhere" in text and "config.json is missing" in text and "holds a run" in text
    with pytest.raises(RecipeError, match="Did you mean bleu"):
        evaluate(taught, rows, "bleuu", overrides=QUIET)
    with pytest.raises(RecipeError, match="once"):
        evaluate([taught, taught], rows, overrides=QUIET)
    with pytest.raises(RecipeError, match=r"evaluation\.generate"):
        evaluate(taught, rows, rows=-3, overrides=QUIET)


def test_an_adapter_is_answered_by_beside_its_base(
    tiny_model_folder: Path, rows: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("peft")
    result = train(
        *(tiny_model_folder, chat_file, tmp_path / "run"),
        algorithm="lora_sft",
        data={"validation": str(rows)},
        training={"steps": 6, "preflight": False},
        optimizer={"lr": 3e-2},
    )
    assert result.model_path is not None and (result.model_path / "adapter_config.json").is_file()
    found = evaluate([tiny_model_folder, result.model_path], rows, "f1", rows=4, overrides=QUIET).scores
    # float32; the same sums over other packs.
    assert found["model"]["loss"] == pytest.approx(result.metrics["validation_loss_before"], rel=1e-5)
    assert found["final"]["loss"] == pytest.approx(result.metrics["validation_loss"], rel=1e-5)
    assert found["final"]["loss"] < found["model"]["loss"] - 0.01
    words = ["--prompt", "What comes after 4?", "--model.dtype", "float32", "--max-new-tokens", "8"]
    assert main(["chat", "--model", str(result.model_path), *words]) == 0
    assert len(capsys.readouterr().out) > 1
    card = front_matter((result.model_path / "README.md").read_text())
    assert card["library_name"] == "peft"


@pytest.mark.parametrize("text, said", [("{}", "names no base_model_name_or_path"), ("[", "cannot be read")])
def test_an_adapter_without_a_base_is_refused(text: str, said: str, rows: Path, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(RecipeError, match=said):
        evaluate(tmp_path, rows, overrides=QUIET)


def test_names_are_as_short_as_tells_models_apart():
    assert names_of(["out/final"]) == ["final"]
    assert names_of(["a/final", "b/final"]) == ["a/final", "b/final"]
    assert names_of(["base", "org/base"]) == ["base", "org/base"]
    assert len({*names_of(["/x/base", "x/base"])}) == 2
