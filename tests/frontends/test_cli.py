"""The command line: every setting is a flag, errors are one message with an exit code, and a run is a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from training_hub.errors import RecipeError
from training_hub.frontends.cli import SHORTCUTS, main, recipe_of
from training_hub.recipe.findings import value_at
from training_hub.recipe.load import dump, load
from training_hub.recipe.names import all_settings
from training_hub.version import VERSION

NEEDED = ["sft", "--model", "m", "--data", "d", "--output", "o"]


def problems_of(*words: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_of([*NEEDED, *words])
    return caught.value.problems


def test_every_setting_and_every_spelling_is_a_flag(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["sft", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    words = set(text.replace(",", " ").split())
    one_line = " ".join(text.split())
    for setting in all_settings().values():
        if setting.path != "algorithm":
            assert {f"--{name}" for name in (setting.path, *setting.spellings)} <= words
            assert " ".join(setting.doc.split()[:4]) in one_line


NEED_OTHERS = (
    "checkpoint.keep_best",
    "data.streaming",
    "hub.push",
    "hub.private",
    "osft.importance",
    "parallelism.disable_loss_parallel",
    "parallelism.enable_cpu_offload",
    "parallelism.sequence_parallel",
)


def test_every_boolean_has_both_forms():
    for setting in all_settings().values():
        if setting.is_boolean and setting.path not in NEED_OTHERS:
            is_osft = setting.path.startswith("osft.")
            given = ["osft", *NEEDED[1:], "--osft.energy=0.5"] if is_osft else NEEDED
            given = ["lora-sft", *NEEDED[1:]] if setting.path.startswith("lora.") else given
            assert value_at(recipe_of([*given, f"--{setting.path}"]), setting.path) is True
            for words in ([f"--no-{setting.path}"], [f"--{setting.path}", "false"], [f"--{setting.path}=no"]):
                assert value_at(recipe_of([*given, *words]), setting.path) is False


@pytest.mark.parametrize(
    "words",
    [
        ["--training.steps", "10"],
        ["--training.steps=10"],
        ["training.steps=10"],
        ["--steps", "10"],
        ["--training.max_steps=10"],
        ["training.max_steps=10"],
        ["--training.steps", "9", "training.steps=10"],
        ["--training.steps", "9", "--steps", "10"],
    ],
)
def test_a_setting_can_be_written_in_these_ways(words: list[str]):
    assert recipe_of([*NEEDED, *words]).training.steps == 10


def test_every_short_flag_gives_its_setting():
    given = {"training.epochs": "2", "training.steps": "2", "optimizer.lr": "0.5"}
    for flag, path in SHORTCUTS.items():
        text = given.get(path, "8000" if all_settings()[path].takes_number else "x")
        assert str(value_at(recipe_of([*NEEDED, flag, text]), path)) in (text, f"{text}.0")


def test_a_setting_behind_a_boolean_is_a_setting():
    recipe = recipe_of([*NEEDED, "--data.deduplicate", "training.steps=10"])
    assert recipe.data.deduplicate
    assert recipe.training.steps == 10


def test_keys_of_mappings_can_be_given_one_by_one():
    recipe = recipe_of([*NEEDED, "--data.roles.bot=assistant", "--data.roles.human", "user", "data.columns.text=body"])
    assert recipe.data.roles == {"bot": "assistant", "human": "user"}
    assert recipe.data.columns == {"text": "body"}


TEXTS = [
    "$(touch x)",
    "a b",
    "'q' \"r\"",
    "a: b #c",
    "2024-01-01",
    "no",
    "1e-5",
    "--x",
    "ü\n",
    "a=b",
    "*",
    "[a",
    "\x85",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_arrives_in_every_text_setting_as_it_was_typed(text: str):
    switches = ["monitoring.wandb=true", "monitoring.mlflow=true", "--distillation.teacher=t"]
    for path, setting in all_settings().items():
        only_text = setting.takes_text and not (setting.takes_list or setting.takes_number or setting.takes_boolean)
        if only_text and path not in (
            "algorithm",
            "backend",
            "evaluation.best_metric",
            "hub.repo_id",
            "checkpoint.max_shard_size",
        ):
            for words in ([f"--{path}={text}"], [f"{path}={text}"]):
                command = ["lora-sft", *NEEDED[1:]] if path.startswith("lora.") else NEEDED
                recipe = recipe_of([*command, *switches, *words])
                assert value_at(recipe, path) == text
                assert load(dump(recipe)) == recipe


def test_the_default_backend_is_the_engine():
    assert recipe_of(NEEDED).backend == "torch"
    assert recipe_of([*NEEDED, "--backend", "instructlab-training"]).training.global_batch_size == 3840


def test_flags_win_over_the_file_and_assignments_over_flags(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: {hf_assets_path: m}\ndata: {path: d}\noutput: o\ntraining: {steps: 1, seq_len: 7}\nseed: 3\n"
    )
    recipe = recipe_of(["sft", "--config", str(file), "training.steps=3", "--training.steps", "2", "--seed=4"])
    assert (recipe.training.steps, recipe.training.max_seq_len, recipe.seed) == (3, 7, 4)


def test_everything_wrong_is_said_at_once():
    assert problems_of("--trainig.epochs=1", "--epoch", "3", "foo", "x.y=1", "--epochs", "-1", "--no-seed") == [
        "x.y: not a setting of the recipe. `training-hub sft --help` lists them all.",
        "--trainig.epochs: not a flag. Did you mean --training.epochs?",
        "--epoch: not a flag. Did you mean --epochs?",
        "foo: not understood; a setting is written --section.field VALUE or section.field=VALUE.",
        "--no-seed: not a flag. Did you mean --seed?",
        "training.epochs (--epochs): found -1; allowed: a number greater than 0, or null. Write --epochs 1",
    ]


def test_flags_are_not_guessed_from_their_beginnings():
    assert problems_of("--learning", "1")[0].startswith("--learning: not a flag.")


def test_a_file_for_another_algorithm_is_refused(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("algorithm: osft\n")
    assert "the command is `training-hub sft`" in problems_of("--config", str(file))[0]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "training_hub", *words], capture_output=True, text=True, timeout=120)


def test_an_error_is_a_message_and_an_exit_code_and_no_traceback(capsys: pytest.CaptureFixture[str]):
    assert main(["sft", "--model", "m", "--data", "d"]) == 2
    streams = capsys.readouterr()
    assert streams.err == "error: output: not given. Write --output OUTPUT_FOLDER\n"
    assert streams.out == ""


def test_debug_shows_the_traceback():
    done = run("sft", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "training-hub" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["stf"], ["schema", "--x"], ["sft", "--config"], ["sft", "--config", "absent.yaml"]])
def test_what_the_parser_refuses_is_an_error_like_others(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_ends_with_the_place_of_the_model(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    words = ["sft", "--model", "m", "--data", "d", "--output", str(output), "--backend", "recorder"]
    assert main([*words, "--monitoring.console", "off"]) == 0
    assert capsys.readouterr().out == f"finished: model in {output / 'final'}\n"
    assert main([*words, "--seed", "13"]) == 2
    assert "seed: 13 brings bad luck" in capsys.readouterr().err


def test_the_module_is_the_command_and_the_schema_is_json():
    done = run("schema")
    assert done.returncode == 0
    assert json.loads(done.stdout)["properties"]["seed"]["default"] == 42


def test_algorithms_and_versions_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["algorithms"]) == 0
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sft: instructlab-training, torch")
    assert lines[1].startswith("osft: mini-trainer, torch")
    assert lines[2].startswith("lora_sft: unsloth, torch")
    assert lines[3] == f"training-hub {VERSION}"
    assert any(line.startswith("torch ") for line in lines)


def test_output_that_nobody_reads_is_no_bug():
    command = f"{sys.executable} -m training_hub schema | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "{\n"
    assert done.stderr == ""
