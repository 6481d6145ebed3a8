"""Interrupted + resumed = uninterrupted, bit for bit, however the run was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.run import final_weights, recipe, train
from tests.moments import PATIENCE_SECONDS, act_in
from training_hub.backends import Given
from training_hub.errors import CheckpointError, Interrupted, RecipeError, TrainingError
from training_hub.launch import run
from training_hub.monitoring.jsonl import read_metrics
from training_hub.recipe import Recipe
from training_hub.recipe.load import dump

EVERY_STEP = {"interval": 1, "keep_last": 2, "minutes": None}


class StopAt:
    """A callback that ends the run after a step, as a crash in user code would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, report) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


def same_weights(one, other) -> bool:
    first, second = final_weights(one), final_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def unbroken(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("runs") / "unbroken", checkpoint=EVERY_STEP)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_run_that_fails_goes_on_to_the_same_bits(tiny_model_folder, chat_file, tmp_path, unbroken, step):
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(step)], checkpoint=EVERY_STEP)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP)
    assert same_weights(resumed, unbroken)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in unbroken.history]
    assert [row["step"] for row in resumed.history] == list(range(1, 9))


def test_bfloat16_masters_and_dropout_resume_bit_for_bit_too(chat_file, tiny_model_folder, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, resid_pdrop=0.2)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    low = {"path": str(folder), "dtype": "bfloat16"}
    whole = train(folder, chat_file, tmp_path / "whole", model=low)
    with pytest.raises(TrainingError):
        train(folder, chat_file, tmp_path / "run", [StopAt(4)], model=low, checkpoint=EVERY_STEP)
    assert same_weights(train(folder, chat_file, tmp_path / "run", model=low, checkpoint=EVERY_STEP), whole)


HELD = """
import sys, yaml
from pathlib import Path
from tests.moments import hold
from training_hub.backends import Given
from training_hub.errors import HubError
from training_hub.launch import run
from training_hub.recipe import Recipe

try:
    recipe = Recipe.model_validate(yaml.safe_load(open(sys.argv[1])))
    run(recipe, Given(watchers=[lambda report: hold(Path(sys.argv[2])) if report.step == 4 else None]))
except HubError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def held_in_step_4(asked: Recipe, act: Callable[[subprocess.Popen[str]], object]) -> tuple[int, str]:
    """Exit code and errors of a run in a process of its own, to which `act` is done once its fourth step is reported
    and not yet saved; before `act` is over the run goes no further."""
    place = Path(asked.output).parent
    (place / "asked.yaml").write_text(dump(asked))
    words = [sys.executable, "-c", HELD, str(place / "asked.yaml"), str(place / "step-4")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    act_in(place / "step-4", lambda: act(process))
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, said


def test_kill_9_loses_nothing_that_was_saved(tiny_model_folder, chat_file, tmp_path, unbroken):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP)
    held_in_step_4(asked, lambda process: process.kill())
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-2", "step-3"]
    assert not (tmp_path / "run" / "final").exists()
    assert same_weights(run(asked), unbroken)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_step_boundary_and_says_how_to_go_on(
    tiny_model_folder, chat_file, tmp_path, unbroken, number
):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run")
    code, said = held_in_step_4(asked, lambda process: process.send_signal(number))
    assert code == 128 + number
    assert "Run the same command again to go on from there" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-4"]
    assert same_weights(run(asked), unbroken)


def test_a_signal_inside_the_calling_process_raises_interrupted(tiny_model_folder, chat_file, tmp_path):
    def terminate(report) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"SIGTERM received: stopped after step \d of 8") as caught:
        train(tiny_model_folder, chat_file, tmp_path / "run", [terminate])
    assert caught.value.exit_code == 143


def test_a_damaged_newest_checkpoint_costs_one_step_and_not_the_run(tiny_model_folder, chat_file, tmp_path, unbroken):
    with pytest.raises(TrainingError):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(5)], checkpoint=EVERY_STEP)
    weights = tmp_path / "run" / "checkpoints" / "step-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    assert same_weights(train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP), unbroken)


def test_a_finished_run_is_returned_and_not_trained_again(tiny_model_folder, chat_file, tmp_path):
    first = train(tiny_model_folder, chat_file, tmp_path / "run")
    again = train(tiny_model_folder, chat_file, tmp_path / "run")
    assert again.status == "already finished"
    assert again.metrics == first.metrics
    assert again.model_path == first.model_path


def test_another_recipe_in_the_folder_is_refused_field_by_field(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(TrainingError):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(3)], checkpoint=EVERY_STEP)
    with pytest.raises(CheckpointError) as caught:
        train(tiny_model_folder, chat_file, tmp_path / "run", optimizer={"lr": 2e-3}, seed=7)
    assert "optimizer.lr: was 0.001, now 0.002" in caught.value.problems
    assert "seed: was 42, now 7" in caught.value.problems
    assert "checkpoint.resume: restart" in caught.value.problems[-1]


def test_changed_data_under_the_same_recipe_is_refused(tiny_model_folder, chat_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(chat_file.read_text())
    with pytest.raises(TrainingError):
        train(tiny_model_folder, rows, tmp_path / "run", [StopAt(3)], checkpoint=EVERY_STEP)
    rows.write_text(chat_file.read_text().replace("I think", "for sure"))
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        train(tiny_model_folder, rows, tmp_path / "run", checkpoint=EVERY_STEP)


def test_restart_moves_the_old_run_aside_and_loses_none_of_it(tiny_model_folder, chat_file, tmp_path):
    old = train(tiny_model_folder, chat_file, tmp_path / "run")
    before = final_weights(old)
    new = train(tiny_model_folder, chat_file, tmp_path / "run", seed=7, checkpoint={"resume": "restart"})
    kept = load_file(tmp_path / "run.before-1" / "final" / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, final_weights(new)[name]) for name, tensor in before.items())


def test_two_runs_at_once_in_one_folder_are_refused(tiny_model_folder, chat_file, tmp_path):
    asked = recipe(tiny_model_folder, chat_file, tmp_path / "run")

    def start_again(report) -> None:
        run(asked)

    with pytest.raises(RecipeError, match="is in use by another run"):
        run(asked, Given(watchers=[start_again]))


def test_a_changed_model_under_the_same_recipe_is_refused(tiny_model_folder, chat_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    with pytest.raises(TrainingError):
        train(folder, chat_file, tmp_path / "run", [StopAt(3)], checkpoint=EVERY_STEP)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.001}))
    with pytest.raises(CheckpointError, match=r"model config\.rms_norm_eps: was 1e-06, now 0\.001"):
        train(folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP)


def test_a_checkpoint_of_another_run_in_the_folder_is_refused(tiny_model_folder, chat_file, tmp_path):
    for name, seed in (("run", 42), ("other", 7)):
        with pytest.raises(TrainingError):
            train(tiny_model_folder, chat_file, tmp_path / name, [StopAt(3)], checkpoint=EVERY_STEP, seed=seed)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="seed: was 7, now 42"):
        train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP)
