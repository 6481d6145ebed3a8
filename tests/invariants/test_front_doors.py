"""However a run is called, and wherever its rows come from, the same bits come out."""

from __future__ import annotations

import json

import pytest
import torch

from tests.invariants.run import final_weights
from training_hub import TrainResult, create_algorithm, sft
from training_hub.frontends.cli import main
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.load import load_file

SETTINGS = {"effective_batch_size": 16, "learning_rate": 1e-3, "max_seq_len": 256, "seed": 3}


def call(model, rows, output, **more) -> TrainResult:
    overrides = {"model.dtype": "float32", "data.cache": False, "monitoring.console": "off"}
    return sft(str(model), rows, str(output), backend="torch", overrides=overrides, **{**SETTINGS, **more})


def same_bits(one, other) -> bool:
    first, second = final_weights(one), final_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def by_function(tiny_model_folder, chat_file, tmp_path_factory):
    return call(tiny_model_folder, str(chat_file), tmp_path_factory.mktemp("doors") / "function")


def test_flags_and_yaml_give_what_the_function_gives(by_function, tiny_model_folder, chat_file, tmp_path, capsys):
    flags = ["--batch-size=16", "--learning-rate=1e-3", "--max-seq-len=256", "seed=3", "--model.dtype=float32"]
    shared = ["--no-data.cache", "--monitoring.console=off"]
    named = ["--model", str(tiny_model_folder), "--data", str(chat_file), "--output", str(tmp_path / "flags")]
    assert main(["sft", *named, *flags, *shared]) == 0
    recipe = RunFolder(by_function.output_dir).recipe.read_text()
    (tmp_path / "run.yaml").write_text(recipe.replace(str(by_function.output_dir), str(tmp_path / "yaml")))
    assert main(["sft", "--config", str(tmp_path / "run.yaml")]) == 0
    capsys.readouterr()
    for name in ("flags", "yaml"):
        made = TrainResult("finished", tmp_path / name, tmp_path / name / "final")
        assert same_bits(made, by_function)
        asked = load_file(tmp_path / name / "recipe.yaml").model_copy(update={"output": "x"})
        assert asked == load_file(by_function.output_dir / "recipe.yaml").model_copy(update={"output": "x"})


def test_rows_in_memory_train_as_the_file_does(by_function, tiny_model_folder, chat_file, tmp_path):
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    kinds = {"list": rows, "frame": pandas.DataFrame(rows), "dataset": datasets.Dataset.from_list(rows)}
    for name, given in kinds.items():
        assert same_bits(call(tiny_model_folder, given, tmp_path / name), by_function), name


def test_the_factory_trains_too_and_callbacks_see_every_step(by_function, tiny_model_folder, chat_file, tmp_path):
    seen = []
    result = create_algorithm("sft", "instructlab-training").train(
        model_path=str(tiny_model_folder),
        data_path=str(chat_file),
        ckpt_output_dir=str(tmp_path / "run"),
        num_epochs=2,
        learning_rate=2e-6,
        max_seq_len=256,
        max_batch_len=1024,
        effective_batch_size=32,
        data_output_dir=str(tmp_path / "cache"),
        callbacks=[seen.append],
        overrides={"monitoring.console": "off"},
    )
    assert [report.step for report in seen] == [1, 2, 3, 4]
    assert [report.loss for report in seen] == [row["loss"] for row in result.history]
    assert len(result.checkpoints) == 2  # the contract saves at each epoch
    assert result.engine == "torch"


def test_pretraining_blocks_train_through_the_function(tiny_model_folder, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"doc": f"Number {i} follows {i - 1}. " * 5}) + "\n" for i in range(1, 40)))
    result = call(
        tiny_model_folder,
        str(documents),
        tmp_path / "run",
        is_pretraining=True,
        block_size=64,
        document_column_name="doc",
        max_steps=8,
    )
    assert result.plan["longest_sample"] == 64
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.plan["trained_tokens"] == result.plan["tokens"] - result.plan["samples"]
