"""How long training stands still at a save, by checkpoint.async_mode: the same run in each mode, in turn.

    python benchmarks/saving.py --output benchmarks/SAVING.md

A run saves after every third step. It stands still from the report of a step to the beginning of the next, both of
which metrics.jsonl tells. Steps are parted into those beside which a checkpoint may be written, the first after a save,
and the others. All files that a run writes are on the disk of --place.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from materials import SIZES, made_up, make_model, texts_of, write_rows

MODES = ("disabled", "async", "async_with_pinned_mem")
INTERVAL = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", default="28m", choices=SIZES)
    parser.add_argument("--place", type=Path, help="a folder on the disk to measure (default: that of temporary files)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "MODE"), help="do one run; used by this script")
    asked = parser.parse_args()
    if asked.one:
        one(asked, *asked.one)
    else:
        compare(asked)


def compare(asked: argparse.Namespace) -> None:
    """All rounds, and the page about them."""
    with tempfile.TemporaryDirectory(dir=asked.place) as place:
        rows = made_up(asked.batch * asked.steps)
        make_model(Path(place) / "model", asked.size, texts_of(rows))
        write_rows(Path(place) / "rows.jsonl", rows)
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for number in range(asked.rounds):
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                found[mode].append(measured(asked, Path(place), mode))
                print(mode, found[mode][-1], flush=True)
    page = written(asked, found)
    print(page)
    if asked.output:
        asked.output.write_text(page, encoding="utf-8")


def measured(asked: argparse.Namespace, place: Path, mode: str) -> dict[str, Any]:
    """One run in a process of its own."""
    words = ["--steps", str(asked.steps), "--batch", str(asked.batch), "--one", str(place), mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(asked: argparse.Namespace, folder: str, mode: str) -> None:
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    place = Path(folder)
    output = place / "run"
    began = time.monotonic()
    result = run(
        Recipe.model_validate(
            {
                "output": str(output),
                "model": {"path": str(place / "model"), "dtype": "float32"},
                "data": {"path": str(place / "rows.jsonl"), "cache_dir": str(place / "cache")},
                "training": {"global_batch_size": asked.batch, "steps": asked.steps, "preflight": False},
                "checkpoint": {
                    "interval": INTERVAL, "keep_last": 1, "minutes": None, "final": False, "async_mode": mode,
                },
                "monitoring": {"console": "off"},
            }
        )
    )  # fmt: skip
    size = sum(file.stat().st_size for file in result.checkpoints[-1].iterdir())
    print(json.dumps({**told(result.history), "bytes": size, "seconds": time.monotonic() - began}))
    shutil.rmtree(output)


def told(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds without a step after those that were saved, and seconds of steps."""
    pairs = list(itertools.pairwise(history))
    still = {row["step"]: after["time"] - row["time"] - after["step_seconds"] for row, after in pairs}
    saved = [step for step in still if step % INTERVAL == 0]
    return {
        "still": [still[step] for step in saved],
        "between": statistics.median(gap for step, gap in still.items() if step not in saved),
        "beside": [row["step_seconds"] for row in history if row["step"] - 1 in saved],
        "alone": [row["step_seconds"] for row in history[1:] if row["step"] - 1 not in saved],
    }


def written(asked: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """The page: medians and spread of each mode."""
    size = found["disabled"][0]["bytes"] / 1e6
    lines = [
        "# How long training stands still at a save",
        "",
        "```",
        "python benchmarks/saving.py --output benchmarks/SAVING.md",
        "```",
        "",
        f"A Llama of {asked.size} parameters in float32 with AdamW, whose checkpoint is {size:,.0f} MB; "
        f"{asked.batch} made-up chats a step, {asked.steps} steps in one thread, a save after every "
        f"{INTERVAL} steps; {asked.rounds} runs of each mode, in turn.",
        "",
        f"{machine()}; python {platform.python_version()}, torch {version('torch')}, safetensors "
        f"{version('safetensors')}; {datetime.date.today()}.",
        "",
        "| checkpoint.async_mode | seconds without a step at a save, median (least to most) | a step right after a "
        "save, s | any other step, s |",
        "|---|---|---|---|",
    ]
    medians = {}
    for mode, runs in found.items():
        still, beside, alone = ([value for one in runs for value in one[key]] for key in ("still", "beside", "alone"))
        medians[mode] = statistics.median(still)
        lines.append(
            f"| {mode} | {medians[mode]:.3f} ({min(still):.3f} to {max(still):.3f}) | {statistics.median(beside):.2f} "
            f"| {statistics.median(alone):.2f} |"
        )
    between = statistics.median(one["between"] for runs in found.values() for one in runs)
    shares = " and ".join(f"{medians[mode] / medians['disabled']:.0%} ({mode})" for mode in MODES[1:])
    lines += [
        "",
        f"Of the time that a save takes in turn with the steps, training stands still for {shares}. Between two steps "
        f"without a save lie {between:.3f} s. Copying and the look for numbers that are not finite are what is left; a "
        "thread writes and hashes the rest, and on a CPU takes a core from the steps meanwhile.",
    ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        name = platform.processor()
    load = f", load {os.getloadavg()[0]:.0f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{cores} cores of {name}{load}"


if __name__ == "__main__":
    main()
