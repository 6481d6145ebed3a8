"""The demo: `python -m training_hub.demo` fine-tunes a tiny model on this machine and shows what it learned.

Everything is made here and offline: questions, their answers, and the model's score on questions about words and
numbers that it was not trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from training_hub.demo.base import BASE_FOLDER
from training_hub.demo.scoring import Score, score
from training_hub.demo.show import Shown, show
from training_hub.demo.tasks import Question, draw_questions
from training_hub.errors import Interrupted
from training_hub.monitoring.console import open_console
from training_hub.types import Console, TrainResult

GOAL = 0.9
MARK = "made_by_the_demo.txt"


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 where the model learned what it should, else 1."""
    options = _options(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is on the network, and nothing shall be looked for there
    started = time.monotonic()
    console = open_console()
    folder = fresh_folder(Path(options.output))
    held_out = draw_questions(options.held_out, seed=7, held_out=True)
    data = write_data(folder / "data", trained=options.questions, held_out=held_out)

    console.say(f"Asking the base model {len(held_out)} questions about words and numbers it will not be trained on.")
    before = score(BASE_FOLDER, held_out, console)
    console.say(f"It answers {before.share_right:.1%} of them. Fine-tuning it on {options.questions:,} others.")
    try:
        result = fine_tune(folder, data, options)
    except Interrupted as stopped:
        console.say("Stopped. `make demo` begins anew.")
        return stopped.exit_code
    after = score(_model_path(result), held_out, console)
    show(Shown(before, after, result, base=BASE_FOLDER, data=data[0], seconds=time.monotonic() - started))
    return _verdict(after, console)


def fresh_folder(folder: Path) -> Path:
    """An empty folder; what an earlier demo left there is removed, what somebody else put there is not."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise SystemExit(f"{folder} holds files that the demo did not write. Give another folder: --output DIR")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("The demo may remove this folder when it runs again.\n", encoding="utf-8")
    return folder


def write_data(folder: Path, trained: int, held_out: list[Question]) -> tuple[Path, Path]:
    """The files for training and validation, one conversation a line; returned in this order."""
    folder.mkdir()
    training = _write(folder / "train.jsonl", draw_questions(trained, seed=5, held_out=False))
    return training, _write(folder / "validation.jsonl", held_out)


def fine_tune(folder: Path, data: tuple[Path, Path], options: argparse.Namespace) -> TrainResult:
    """The run itself, as a user would write it."""
    from training_hub import sft

    return sft(
        model_path=str(BASE_FOLDER),
        data_path=str(data[0]),
        validation_data_path=str(data[1]),
        ckpt_output_dir=str(folder / "run"),
        backend="torch",
        max_steps=options.steps,
        effective_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_ratio=0.03,
        max_seq_len=128,
        data_output_dir=str(folder / "cache"),
        validation_frequency=max(1, options.steps // 4),
        overrides={"monitoring.log_interval": 20},
    )


def _write(path: Path, questions: Iterable[Question]) -> Path:
    lines = "".join(json.dumps(question.as_conversation()) + "\n" for question in questions)
    path.write_text(lines, encoding="utf-8")
    return path


def _model_path(result: TrainResult) -> Path:
    if result.model_path is None:
        raise SystemExit("The run ended without a final model, so there is nothing to score.")
    return result.model_path


def _verdict(after: Score, console: Console) -> int:
    if after.share_right > GOAL:
        return 0
    console.say(f"The model should answer more than {GOAL:.0%}; it answers {after.share_right:.1%}.")
    return 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    reader = argparse.ArgumentParser(prog="python -m training_hub.demo", description=(__doc__ or "").split("\n")[0])
    reader.add_argument("--output", default="demo-run", help="folder of the run (default: %(default)s)")
    reader.add_argument("--steps", type=int, default=1200, help="optimizer steps (default: %(default)s)")
    reader.add_argument("--batch-size", type=int, default=32, help="questions per step (default: %(default)s)")
    reader.add_argument("--learning-rate", type=float, default=1e-3, help="peak (default: %(default)s)")
    reader.add_argument("--questions", type=int, default=20000, help="questions to train on (default: %(default)s)")
    reader.add_argument("--held-out", type=int, default=220, help="questions to score with (default: %(default)s)")
    return reader.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
