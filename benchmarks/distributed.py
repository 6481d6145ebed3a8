"""Two processes of one thread against one process of two threads: the same run, on the same two cores, in turn.

    python benchmarks/distributed.py      # all layouts, float32 and bfloat16; 30 minutes on two quiet cores

Each round runs every side once, in an order that turns by one from round to round. Tokens per second are those of the
steps after the first two. Processor seconds are user and system time of all processes of a side, from start to end.
Each run is a line of benchmarks/distributed.jsonl with versions and machine, from which DISTRIBUTED.md is written.
GSM8K is read from the folder named by TRAINING_HUB_TEST_DATA; without it rows are made up.
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

from materials import SIZES, gsm8k, made_up, make_model, texts_of, write_rows

ONE = "one process"
SIDES: dict[str, dict[str, int]] = {
    ONE: {},
    "replicas": {},
    "slices (FSDP2)": {"data_parallel_shard_degree": 2},
    "heads (TP)": {"tensor_parallel_degree": 2},
    "tokens (CP)": {"context_parallel_degree": 2},
    "stages (PP)": {"pipeline_parallel_degree": 2},
}
"""Sides, and the degrees of parallelism of those that are two processes."""

DTYPES = ("float32", "bfloat16")
WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", default="28m", choices=SIZES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of both files")
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "SIDE", "DTYPE", "RUN"), help="used by this script")
    asked = parser.parse_args()
    if asked.one:
        one(asked, *asked.one)
    else:
        compare(asked)


def compare(asked: argparse.Namespace) -> None:
    """All rounds, their lines, and the page about them."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        test_data = os.environ.get("TRAINING_HUB_TEST_DATA")
        needed = asked.batch * asked.steps
        rows = gsm8k(Path(test_data))[:needed] if test_data else made_up(needed)
        make_model(Path(place) / "model", asked.size, texts_of(rows))
        write_rows(Path(place) / "rows.jsonl", rows)
        for number in range(asked.rounds):
            first = number % len(asked.sides)
            for side in [*asked.sides[first:], *asked.sides[:first]]:
                for dtype in asked.dtypes:
                    about = {"side": side, "dtype": dtype, "round": number, "size": asked.size, "batch": asked.batch}
                    what = "GSM8K" if test_data else "made up"
                    found.append({**about, "rows": what, **measured(asked, Path(place), side, dtype, number)})
                    print(f"{side} {dtype}: {found[-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    (asked.output / "distributed.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    page = written(found)
    print(page)
    (asked.output / "DISTRIBUTED.md").write_text(page, encoding="utf-8")


def measured(asked: argparse.Namespace, place: Path, side: str, dtype: str, number: int) -> dict[str, Any]:
    """One run of a side in a process of its own."""
    words = ["--steps", str(asked.steps), "--batch", str(asked.batch)]
    words += ["--one", str(place), side, dtype, f"{list(SIDES).index(side)}-{dtype}-{number}"]
    # Idle threads that spin take cores away from whatever else runs on the machine, and from each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "2" if side == ONE else "1", "OMP_WAIT_POLICY": "PASSIVE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    about = {
        "machine": machine(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
        "date": str(datetime.date.today()),
    }
    return {**json.loads(done.stdout.splitlines()[-1]), "processor_seconds": seconds, **about}


def one(asked: argparse.Namespace, folder: str, side: str, dtype: str, name: str) -> None:
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    place = Path(folder)
    result = run(
        Recipe.model_validate(
            {
                "output": str(place / name),
                "model": {"path": str(place / "model"), "dtype": dtype},
                "data": {"path": str(place / "rows.jsonl"), "cache_dir": str(place / "cache")},
                "training": {"global_batch_size": asked.batch, "steps": asked.steps, "preflight": False},
                "checkpoint": {"minutes": None, "final": False},
                "monitoring": {"console": "off"},
                "processes": {"procs": 1 if side == ONE else 2},
                "parallelism": SIDES[side],
            }
        )
    )
    rows = result.history[WARM_STEPS:]
    rate = sum(row["tokens"] for row in rows) / sum(row["step_seconds"] for row in rows)
    print(json.dumps({"tokens_per_second": rate, "losses": [row["loss"] for row in result.history]}))


def written(found: list[dict[str, Any]]) -> str:
    """The page: for each format medians and spread of each side, its ratio to one process, and how far losses lie
    apart."""
    one = found[-1]
    lines = [
        "# Two processes against one",
        "",
        "```",
        "python benchmarks/distributed.py",
        "```",
        "",
        f"A Llama of {one['size']} parameters, {one['batch']} rows a step ({one['rows']}), {len(one['losses'])} steps, "
        f"of which the first {WARM_STEPS} are not counted, {1 + one['round']} rounds of all sides in turn. One process "
        "has two threads, two have one each, on the same two cores; gloo is what they talk through. The ratio is that "
        "of the medians, in brackets the lowest and highest of the rounds. A step is one pack, so stages wait "
        "for each other half the time; `training-hub plan` says how long they do for a recipe.",
        "",
        f"{one['machine']}, load {one['load']:.0f} at the end; "
        + ", ".join(f"{name} {number}" for name, number in one["versions"].items())
        + f"; {one['date']}. Every run is a line of `distributed.jsonl`.",
    ]
    for dtype in dict.fromkeys(each["dtype"] for each in found):
        lines += ["", *_table([each for each in found if each["dtype"] == dtype], dtype)]
    return "\n".join(lines) + "\n"


def _table(found: list[dict[str, Any]], dtype: str) -> list[str]:
    lines = [
        f"| {dtype} | tokens/s, median (all) | over one process | processor seconds of a run | losses apart |",
        "|---|---|---|---|---|",
    ]
    alone = [each for each in found if each["side"] == ONE]
    for side in dict.fromkeys(each["side"] for each in found):
        runs = [each for each in found if each["side"] == side]
        rates = [each["tokens_per_second"] for each in runs]
        cells = [side, f"{statistics.median(rates):,.0f} ({', '.join(f'{rate:,.0f}' for rate in rates)})"]
        if alone:
            base = [each["tokens_per_second"] for each in alone]
            each_round = [rate / other for rate, other in zip(rates, base, strict=True)]
            ratio = statistics.median(rates) / statistics.median(base)
            cells.append(f"{ratio:.2f} ({min(each_round):.2f} to {max(each_round):.2f})")
        else:
            cells.append("")
        cells.append(f"{statistics.median(each['processor_seconds'] for each in runs):.0f}")
        pairs = zip(runs[0]["losses"], alone[0]["losses"] if alone else runs[0]["losses"], strict=True)
        cells.append(f"{max(abs(a - b) for a, b in pairs):.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        name = platform.processor()
    return f"{cores} cores of {name}"


if __name__ == "__main__":
    main()
