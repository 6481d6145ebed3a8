"""Two processes of one thread against one process of two threads: the same run, on the same two cores, in turn.

    python benchmarks/distributed.py --output benchmarks/DISTRIBUTED.md

Each round runs both sides, the first of them alternately. Tokens per second are those of the steps after the first
two. Processor seconds are user and system time of all processes of a side, from start to end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from materials import SIZES, made_up, make_model, texts_of, write_rows

SIDES = {"1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}
WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", default="28m", choices=SIZES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "PROCS", "RUN"), help="do one run; used by this script")
    asked = parser.parse_args()
    if asked.one:
        one(asked, *asked.one)
    else:
        compare(asked)


def compare(asked: argparse.Namespace) -> None:
    """All rounds, and the page about them."""
    with tempfile.TemporaryDirectory() as place:
        rows = made_up(asked.batch * asked.steps)
        make_model(Path(place) / "model", asked.size, texts_of(rows))
        write_rows(Path(place) / "rows.jsonl", rows)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(asked.rounds):
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                found[side].append(measured(asked, Path(place), side, number))
                print(side, found[side][-1], flush=True)
    page = written(asked, found)
    print(page)
    if asked.output:
        asked.output.write_text(page, encoding="utf-8")


def measured(asked: argparse.Namespace, place: Path, side: str, number: int) -> dict[str, Any]:
    """One run of a side in a process of its own."""
    procs, threads = SIDES[side]
    words = ["--steps", str(asked.steps), "--batch", str(asked.batch)]
    words += ["--one", str(place), str(procs), f"{procs}-{number}"]
    # Idle threads that spin take cores away from whatever else runs on the machine, and from each other.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "processor_seconds": seconds}


def one(asked: argparse.Namespace, folder: str, procs: str, name: str) -> None:
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    place = Path(folder)
    result = run(
        Recipe.model_validate(
            {
                "output": str(place / name),
                "model": {"path": str(place / "model"), "dtype": "float32"},
                "data": {"path": str(place / "rows.jsonl"), "cache_dir": str(place / "cache")},
                "training": {"global_batch_size": asked.batch, "steps": asked.steps, "preflight": False},
                "checkpoint": {"minutes": None, "final": False},
                "monitoring": {"console": "off"},
                "processes": {"procs": int(procs)},
            }
        )
    )
    rows = result.history[WARM_STEPS:]
    rate = sum(row["tokens"] for row in rows) / sum(row["step_seconds"] for row in rows)
    print(json.dumps({"tokens_per_second": rate, "losses": [row["loss"] for row in result.history]}))


def written(asked: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """The page: medians and spread of each side, and how far their losses are apart."""
    losses = [[one["losses"] for one in runs] for runs in found.values()]
    apart = max(abs(a - b) for one, other in zip(*losses, strict=True) for a, b in zip(one, other, strict=True))
    lines = [
        "# Two processes against one",
        "",
        "```",
        "python benchmarks/distributed.py --output benchmarks/DISTRIBUTED.md",
        "```",
        "",
        f"A Llama of {asked.size} parameters in float32, {asked.batch} made-up chats a step, {asked.steps} steps of "
        f"which the first {WARM_STEPS} are not counted, both sides in turn. gloo sums all gradients once a step.",
        "",
        f"{machine()}; python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}; {datetime.date.today()}.",
        "",
        "| side | tokens/s, median (all) | processor seconds of a run, median |",
        "|---|---|---|",
    ]
    for side, runs in found.items():
        rates = [one["tokens_per_second"] for one in runs]
        all_of_them = ", ".join(f"{rate:,.0f}" for rate in rates)
        busy = statistics.median(one["processor_seconds"] for one in runs)
        lines.append(f"| {side} | {statistics.median(rates):,.0f} ({all_of_them}) | {busy:.0f} |")
    first, second = (statistics.median(one["tokens_per_second"] for one in runs) for runs in found.values())
    lines += [
        "",
        f"Two processes over one: {second / first:.2f}. Losses of the two sides differ by at most {apart:.1e}.",
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
