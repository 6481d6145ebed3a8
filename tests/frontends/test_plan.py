"""`training-hub plan`: the numbers of a run before the run, from a config and a tokenizer alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from training_hub.frontends.cli import main
from training_hub.monitoring.jsonl import read_metrics


@pytest.fixture
def without_weights(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


SETTINGS = {
    "epochs": ["--epochs", "2.5", "--batch-size", "5"],
    "steps": ["--steps", "7", "--batch-size", "16"],
    "alone": ["--epochs", "1", "--no-data.packing"],
    "bounded": ["--epochs", "2", "--batch-size", "32", "--training.max_tokens_per_gpu", "60", "--max-seq-len", "60"],
    "bfloat16": ["--steps", "2", "--model.dtype", "bfloat16", "--optimizer.name", "SGD"],
    "validated": [
        "--steps",
        "2",
        "--data.validation_fraction",
        "0.25",
        "--data.overlong",
        "drop",
        "--max-seq-len",
        "30",
    ],
}


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_the_plan_is_the_plan_of_the_run_and_what_the_run_does(
    words: list[str],
    without_weights: Path,
    tiny_model_folder: Path,
    chat_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    shared = ["--data", str(chat_file), "--no-data.cache", "--monitoring.console", "off", *words]
    plan = planned(capsys, "--model", str(without_weights), *shared)
    assert main(["sft", "--model", str(tiny_model_folder), "--output", str(tmp_path / "out"), *shared]) == 0
    assert plan == json.loads((tmp_path / "out" / "plan.json").read_text())
    steps = [row for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if row["step"] > 0]
    assert len(steps) == plan["total_steps"]
    for name in ("samples", "tokens", "trained_tokens"):
        assert sum(step[name] for step in steps) == plan["run"][name]
    assert plan["run"]["steps_laid_out"] == plan["total_steps"]


def test_packs_and_their_fill_are_those_of_the_batches(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--batch-size", "16"]
    plan = planned(capsys, *words, "--training.max_tokens_per_gpu", "100", "--max-seq-len", "100")
    assert plan["tokens_per_pack"] == 100
    run = plan["run"]
    assert run["packs"] == run["packs_per_step"] * plan["total_steps"] >= run["tokens"] / 100
    assert run["fill"] == pytest.approx(run["tokens"] / (100 * run["packs"]))
    assert 0.7 < run["fill"] <= 1
    alone = planned(capsys, *words, "--no-data.packing")["run"]
    assert alone["packs"] == alone["samples"] == 64


def test_words_tell_lengths_memory_and_that_time_is_not_known(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--max-seq-len", "64"]
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    for part in (
        "p50 ",
        "p99 ",
        "max 47 tokens",
        "training.max_seq_len is 64",
        "optimizer state",
        "activations",
        "% full",
    ):
        assert part in text
    assert "time      not estimated; --rate" in text


def test_time_is_told_from_the_rate_of_an_earlier_run(
    without_weights: Path, tiny_model_folder: Path, chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = ["--data", str(chat_file), "--no-data.cache", "--batch-size", "8", "--monitoring.console", "off"]
    assert main(["sft", "--model", str(tiny_model_folder), "--output", str(out), *words]) == 0
    capsys.readouterr()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if row["step"] > 1]
    rate = sum(row["tokens"] for row in rows) / sum(row["step_seconds"] for row in rows)
    for named in (out, out / "metrics.jsonl"):
        plan = planned(capsys, "--model", str(without_weights), *words, "--rate", str(named))
        assert plan["time"]["seconds"] == pytest.approx(plan["run"]["tokens"] / rate)
        assert str(out / "metrics.jsonl") in plan["time"]["basis"]


def test_a_measured_product_gives_a_bound_and_says_so(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--rate", "measure"]
    time = planned(capsys, *words)["time"]
    assert 0 < time["at_least_seconds"] < 60
    assert "matrix product" in time["basis"]
    assert main(["plan", *words]) == 0
    assert "time      at least " in capsys.readouterr().out


def test_the_plan_says_what_several_processes_do(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--batch-size", "8"]
    alone, many = (planned(capsys, *words, "--processes.procs", count) for count in ("1", "4"))
    assert (alone["processes"], many["processes"]) == (1, 4)
    same = ("total_steps", "samples", "tokens", "trained_tokens", "run", "memory_gib")
    assert [alone[name] for name in same] == [many[name] for name in same], "the global batch stays what it is"
    assert alone["exchanged_gib_per_step"] == 0
    # Each gradient goes round a ring twice: 2 (n - 1) / n times 4 bytes.
    assert many["exchanged_gib_per_step"] == pytest.approx(many["trained_parameters"] * 4 * 1.5 / 2**30)
    assert main(["plan", *words, "--processes.procs", "4"]) == 0
    assert "processes 4, each with the whole model and about 2.0 of the 8 samples of a step" in capsys.readouterr().out


def test_the_plan_says_what_a_process_holds_of_a_divided_model(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--model.dtype", "float32"]
    words += ["--processes.procs", "4"]
    whole = planned(capsys, *words)
    slices = planned(capsys, *words, "--parallelism.data_parallel_shard_degree=-1")
    pairs = planned(capsys, *words, "--parallelism.data_parallel_shard_degree", "2")
    assert (whole["slices"], slices["slices"], pairs["slices"]) == (1, 4, 2)
    for name in ("weights", "optimizer"):  # the first process has a row more of a table that cannot be cut evenly
        assert slices["memory_gib"][name] == pytest.approx(whole["memory_gib"][name] / 4, rel=1e-2)
        assert pairs["memory_gib"][name] == pytest.approx(whole["memory_gib"][name] / 2, rel=1e-2)
    assert 0 < slices["memory_gib"]["gathered"] <= whole["memory_gib"]["weights"], "two layers are the whole model"
    assert slices["memory_gib"]["gradients"] < whole["memory_gib"]["gradients"]
    never = planned(
        capsys, *words, "--parallelism.data_parallel_shard_degree=-1", "--parallelism.fsdp_reshard_after_forward=never"
    )
    assert never["memory_gib"]["gathered"] == pytest.approx(whole["memory_gib"]["weights"])
    assert never["exchanged_gib_per_step"] <= slices["exchanged_gib_per_step"]
    assert main(["plan", *words, "--parallelism.data_parallel_shard_degree=-1"]) == 0
    assert "processes 4, each with 1/4 of the model" in capsys.readouterr().out


def test_the_plan_says_what_a_process_computes_of_a_split_model(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--batch-size", "8"]
    words += ["--processes.procs", "4", "--parallelism.tensor_parallel_degree", "2"]
    words += ["--parallelism.context_parallel_degree", "2"]
    whole, split = planned(capsys, *words[:7]), planned(capsys, *words)
    assert split["split_among"] == {"heads": 2, "tokens": 2, "experts": 1}
    for name in ("weights", "optimizer", "gradients", "activations"):
        assert 0.25 < split["memory_gib"][name] / whole["memory_gib"][name] < 0.6, name
    assert main(["plan", *words]) == 0
    said = "processes 4, each with about 1/2 of the model, 1/2 of the tokens of a pack, and about 8.0 of the 8 samples"
    assert said in capsys.readouterr().out


def test_what_is_held_beside_layers_is_shared_out_over_stages_and_the_last_has_the_teacher(
    without_weights: Path, tiny_model_folder: Path, chat_file: Path, capsys
):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--processes.procs", "2"]
    words += ["--distillation.teacher", str(tiny_model_folder), "--algorithm", "osft", "--batch-size", "4"]
    words += ["--osft.unfreeze_rank_ratio", "0.5", "--osft.others", "freeze"]
    whole, stages = (planned(capsys, *words, "--parallelism.pipeline_parallel_degree", one) for one in "12")
    for name in ("optimizer", "gradients"):
        assert stages["memory_gib"][name] == pytest.approx(whole["memory_gib"][name] / 2)
    assert stages["memory_gib"]["teacher"] == whole["memory_gib"]["teacher"] > 0


def test_the_plan_says_what_a_process_holds_of_layers_in_stages(without_weights: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache", "--model.dtype", "float32"]
    words += [
        "--processes.procs",
        "4",
        "--batch-size",
        "16",
        "--training.max_tokens_per_gpu",
        "60",
        "--max-seq-len",
        "60",
    ]
    whole = planned(capsys, *words)
    words += ["--parallelism.pipeline_parallel_degree", "2"]
    forth_and_back = planned(capsys, *words)
    forth = planned(capsys, *words, "--parallelism.pipeline_parallel_schedule", "GPipe")
    stages = forth_and_back["pipeline"]
    packs = whole["run"]["packs_per_step"] / 2
    assert packs > 2 and stages == {
        "processes": 2,
        "schedule": "1F1B",
        "layers": [1, 1],
        "packs": packs,
        "waiting": pytest.approx(1 / (packs + 1)),
    }
    for name in ("weights", "optimizer", "gradients"):
        assert forth_and_back["memory_gib"][name] < whole["memory_gib"][name]
    # Two packs are under way in one of two layers each, with what passes between stages; forward with all it is all.
    assert forth_and_back["memory_gib"]["activations"] >= whole["memory_gib"]["activations"]
    # Those of the process that takes most, which under 1F1B may be the last one, with one pack and the loss.
    ratio = forth["memory_gib"]["activations"] / forth_and_back["memory_gib"]["activations"]
    assert ratio >= packs / 2
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "processes 4, each with its layers of the whole model and about 8.0 of the 16 samples" in said
    assert "stages    of 1, 1 layers, 1F1B; with" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--rate", "nowhere"], 2, "--rate: there is no file nowhere"),
        (["--processes.procs", "0"], 2, "allowed: a whole number of at least 1"),
        (["--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--max-seq-len", "10"], 3, "more than training.max_seq_len 10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_errors(
    without_weights: Path, chat_file: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    named = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache"]
    assert main(["plan", *named, *words]) == code
    assert said in capsys.readouterr().err


def test_a_folder_without_a_config_is_refused(without_weights: Path, chat_file: Path, capsys):
    (without_weights / "config.json").unlink()
    assert main(["plan", "--model", str(without_weights), "--data", str(chat_file)]) == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_an_engine_that_makes_no_plans_says_so(installed: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", "m", "--data", "d", "--backend", "recorder"]) == 4
    assert "backend 'recorder' makes no plans" in capsys.readouterr().err


def test_a_teacher_is_told_and_counted(without_weights: Path, tiny_teacher_folder: Path, chat_file: Path, capsys):
    words = ["--model", str(without_weights), "--data", str(chat_file), "--no-data.cache"]
    words += ["--distillation.teacher", str(tiny_teacher_folder)]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert f"teacher   {tiny_teacher_folder}, forward_kl; asked in each step" in said
    assert "teacher: its weights, states and a chunk of its logits" in said
