"""Bad inputs 87 to 92: settings out of range, data sets too small, and output folders that hold something else."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bad_inputs.desk import CHECKPOINT, DATA, DISK, GOOD, RECIPE, Desk, chat, plain

ROWS = [plain(number) for number in range(4)]
LONG = [chat(("user", "How far?"), ("assistant", "far " * length)) for length in range(1, 60)]
UNFINISHED = ("--training.steps", "2", "--checkpoint.interval", "1")

SETTINGS: tuple[tuple[int, Sequence[str], Sequence[str]], ...] = (
    (87, ["--max-seq-len", "0"], ["training.max_seq_len", "found 0"]),
    (87, ["--max-seq-len", "-5"], ["training.max_seq_len", "found -5"]),
    (88, ["optimizer.lr=-1e-5"], ["optimizer.lr", "found -1e-05"]),
    (88, ["--learning-rate", "-1"], ["optimizer.lr", "found -1"]),
    (88, ["--learning-rate", "-1e-5"], ["--learning-rate", "A value that begins with - is written FLAG=VALUE"]),
    (88, ["--learning-rate=-1e-5"], ["optimizer.lr", "found -1e-05"]),
    (88, ["--learning-rate", "0"], ["optimizer.lr", "found 0"]),
    (88, ["--learning-rate", ".nan"], ["optimizer.lr", "nan"]),
    (88, ["--learning-rate", "1e9"], ["optimizer.lr", "found 1000000000.0", "only destroys the model"]),
    (88, ["--learning-rate", "fast"], ["optimizer.lr", "found 'fast'"]),
    (89, ["--batch-size", "0"], ["training.global_batch_size", "found 0"]),
    (89, ["--batch-size", "-8"], ["training.global_batch_size", "found -8"]),
    (
        89,
        ["--training.global_bach_size", "8"],
        ["--training.global_bach_size: not a flag", "training.global_batch_size"],
    ),
    (89, ["training.epoch=2"], ["training.epoch", "training.epochs"]),
    (89, ["--epochs", "2"], ["training.epochs", "training.steps", "one excludes the other"]),
    (89, ["--processes.procs", "0"], ["processes.procs", "found 0", "Write processes.procs: 1"]),
    (90, ["--training.steps", "0"], ["training.steps", "found 0"]),
    (92, ["--checkpoint.resume", "checkpoint-500"], ["checkpoint.resume", "'checkpoint-500'"]),
)


@pytest.mark.parametrize(
    ("words", "said"), [(w, s) for _, w, s in SETTINGS], ids=[f"{n}-{' '.join(w)}" for n, w, _ in SETTINGS]
)
def test_setting(words: Sequence[str], said: Sequence[str], desk: Desk) -> None:
    desk.train(ROWS, *words).refused(RECIPE, *said)


def test_87_lengths_beyond_max_seq_len_are_told_with_what_would_hold_them(desk: Desk) -> None:
    outcome = desk.train(LONG, "--max-seq-len", "100")
    outcome.refused(
        DATA,
        "40 problems:",
        "training.max_seq_len: ",
        "of 59 samples",
        "99% have at most",
        "the longest has",
        "line 21: 102 tokens",
    )


def test_87_what_is_cut_is_told_with_what_is_left_untrained(desk: Desk) -> None:
    rows = [*LONG, chat(("user", "word " * 200), ("assistant", "Yes."))]
    outcome = desk.train(rows, "--max-seq-len", "100", "--data.overlong", "truncate")
    outcome.trained(
        "rows cut at training.max_seq_len", "tokens lost by that", "1 rows left out because they are longer"
    )


def test_87_more_tokens_than_the_model_was_trained_for_are_told(desk: Desk) -> None:
    row = chat(("user", "How far?"), ("assistant", "far " * 300))
    desk.train([row], "--max-seq-len", "4000").trained("tokens, but the model has 512 positions")


def test_88_a_learning_rate_that_is_text_is_refused(desk: Desk) -> None:
    recipe = desk.file('optimizer:\n  lr: "1e-5"\n', "recipe.yaml")
    desk.train(ROWS, "--config", str(recipe)).refused(
        RECIPE, "optimizer.lr", "found '1e-5'; allowed: a number greater than 0"
    )


def test_88_a_learning_rate_written_1e_5_in_YAML_is_a_number(desk: Desk) -> None:
    recipe = desk.file("optimizer:\n  lr: 1e-5\n", "recipe.yaml")
    desk.train(ROWS, "--config", str(recipe)).trained()


def test_88_a_learning_rate_above_a_hundredth_is_told_aloud(desk: Desk) -> None:
    desk.train(ROWS, "--learning-rate", "0.05").trained("optimizer.lr: 0.05 is far above what a pretrained model takes")


def test_89_all_wrong_settings_are_told_at_once(desk: Desk) -> None:
    words = ("--batch-size", "0", "--learning-rate", "-1", "--max-seq-len", "none", "--data.overlng", "drop")
    said = ("training.global_batch_size", "optimizer.lr", "training.max_seq_len", "--data.overlng: not a flag")
    desk.train(ROWS, *words).refused(RECIPE, "4 problems", *said)


def test_90_one_row_is_enough(desk: Desk) -> None:
    desk.train([GOOD], "--batch-size", "32").trained("plan: 1 steps over 1 samples")


def test_90_no_epochs_are_refused(desk: Desk) -> None:
    recipe = desk.file("training:\n  epochs: 0\n", "recipe.yaml")
    desk.train(ROWS, "--config", str(recipe)).refused(RECIPE, "training.epochs", "found 0")


def test_90_a_data_set_of_which_nothing_is_left_is_refused(desk: Desk) -> None:
    words = ("--max-seq-len", "8", "--data.overlong", "drop")
    desk.train(ROWS, *words).refused(DATA, "all 4 rows are longer than training.max_seq_len and were dropped")


def test_90_a_validation_share_that_leaves_nothing_is_refused(desk: Desk) -> None:
    desk.train([GOOD], "--data.validation_fraction", "0.5").refused(DATA, "leaves nothing to train on")


def test_91_a_folder_that_holds_another_run_is_refused_naming_what_differs(desk: Desk) -> None:
    desk.train(ROWS, "--learning-rate", "1e-5").trained()
    again = desk.train(ROWS, "--learning-rate", "2e-5", "--seed", "7")
    again.refused(
        CHECKPOINT, "holds a finished run of a different recipe", "optimizer.lr: was 1e-05, now 2e-05", "seed: was"
    )


def test_91_a_folder_with_a_model_of_unknown_origin_is_refused(desk: Desk) -> None:
    (desk.folder / "out" / "final").mkdir(parents=True)
    desk.train(ROWS).refused(CHECKPOINT, "but no recipe.yaml", "Name another output")


def test_91_an_output_that_is_a_file_is_refused(desk: Desk) -> None:
    output = desk.file("", "taken")
    desk.train(ROWS, output=output).refused(RECIPE, f"output: {output} cannot be written")


def test_91_an_output_inside_a_file_is_refused(desk: Desk) -> None:
    output = desk.file("", "taken") / "out"
    desk.train(ROWS, output=output).refused(RECIPE, f"output: {output} cannot be written")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where nobody may make a folder")
def test_91_an_output_that_cannot_be_made_is_refused(desk: Desk) -> None:
    desk.train(ROWS, output="/proc/out").refused(RECIPE, "output: /proc/out cannot be written")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no small file system to fill: /dev/shm")
def test_91_a_disk_that_cannot_hold_the_run_is_refused(desk: Desk) -> None:
    room = shutil.disk_usage("/dev/shm").free
    config = desk.folder / "model" / "config.json"
    shutil.copytree(desk.model, config.parent)
    # Only the shapes that the config names count: weights of these shapes are never read, let alone there.
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": room // 32 // 16 * 16}))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as output:
        outcome = desk.train(ROWS, *UNFINISHED, model=config.parent, output=output)
    outcome.refused(DISK, f"output: {output} needs", "and has", "free; a checkpoint takes")


def unfinished(desk: Desk, *words: str) -> Path:
    """A run that was stopped after its checkpoint: what its end writes is not there."""
    desk.train(ROWS, *UNFINISHED, *words).trained()
    (desk.folder / "out" / "result.json").unlink()
    return desk.folder / "out"


def test_92_a_run_goes_on_where_nothing_changed(desk: Desk) -> None:
    unfinished(desk)
    desk.train(ROWS, *UNFINISHED).trained("resume: going on after step 2 of 2")


def test_92_resuming_with_other_data_is_refused(desk: Desk) -> None:
    unfinished(desk)
    desk.train([*ROWS, GOOD, plain(9)], *UNFINISHED).refused(CHECKPOINT, "data_fingerprint: was")


def test_92_resuming_with_other_settings_is_refused_field_by_field(desk: Desk) -> None:
    unfinished(desk)
    outcome = desk.train(ROWS, *UNFINISHED, "--max-seq-len", "128", "--optimizer.name", "SGD")
    said = ("training.max_seq_len: was 256, now 128", "optimizer.name: was 'AdamW', now 'SGD'")
    outcome.refused(CHECKPOINT, "an unfinished run of a different recipe", *said)


def test_92_resuming_with_another_model_under_the_same_name_is_refused(desk: Desk) -> None:
    model = desk.folder / "model"
    shutil.copytree(desk.model, model)
    desk.train(ROWS, *UNFINISHED, model=model).trained()
    (desk.folder / "out" / "result.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    desk.train(ROWS, *UNFINISHED, model=model).refused(CHECKPOINT, "model config.rms_norm_eps: was")


def test_92_a_run_of_newer_code_is_refused(desk: Desk) -> None:
    recipe = unfinished(desk) / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "fusion:\n  cold: true\n")
    desk.train(ROWS, *UNFINISHED).refused(
        CHECKPOINT, "cannot be read by this version", "fusion", "checkpoint.resume: restart"
    )
