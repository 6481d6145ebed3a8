"""The jax engine against the torch engine: `python benchmarks/second_engine.py` prints one table.

Both train the same weights on the same rows in the same packs, each in a process of its own, in turn (A B A B ...). The
first two steps, in which programs are compiled and kernels built, are left out. Useful tokens are those of samples,
padding is none. Told are tokens per second, and per second that all threads together spent on a processor, which other
work on the machine hardly changes; the median of the rounds and their range. What each process did is appended to the
file of --output. GSM8K is read from the folder named by TRAINING_HUB_TEST_DATA; without it made-up rows stand in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from materials import gsm8k, made_up, make_model, texts_of, write_rows

ENGINES = ("torch", "jax")
LEFT_OUT = 2


def train(
    engine: str, dtype: str, model: str, rows: str, output: str, batch: int, steps: int, tokens: int
) -> dict[str, Any]:
    """One run in this process: tokens, seconds, seconds of processor and losses of the steps that count."""
    from training_hub.backends import Given
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    marks: list[tuple[int, float, float]] = []

    def note(report: Any) -> None:
        marks.append((report.tokens, time.perf_counter(), time.process_time()))

    recipe = {
        "backend": engine,
        "output": output,
        "model": {"path": model, "dtype": dtype},
        "data": {"path": rows, "cache": False},
        "training": {
            "steps": steps,
            "global_batch_size": batch,
            "max_seq_len": 1024,
            "max_tokens_per_gpu": tokens,
            "preflight": False,
            "activation_checkpointing": "none",
        },
        "checkpoint": {"minutes": None, "final": False},
        "monitoring": {"console": "off"},
    }
    result = run(Recipe.model_validate(recipe), Given(watchers=[note]))
    _, began, busy = marks[LEFT_OUT - 1]
    return {
        "engine": engine,
        "dtype": dtype,
        "tokens": sum(mark[0] for mark in marks[LEFT_OUT:]),
        "seconds": marks[-1][1] - began,
        "processor_seconds": marks[-1][2] - busy,
        "first_step_seconds": result.history[0]["step_seconds"],
        "memory_gib": result.metrics["memory_gib"],
        "losses": [row["loss"] for row in result.history],
        "versions": result.versions,
    }


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Every engine in every format, round by round, each in a process of its own."""
    data = os.environ.get("TRAINING_HUB_TEST_DATA")
    rows = gsm8k(Path(data)) if data else made_up()
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", asked.size, texts_of(rows))
        path = write_rows(Path(folder) / "rows.jsonl", rows)
        for number in range(asked.rounds):
            for dtype in asked.dtype:
                for engine in ENGINES:
                    output = Path(folder) / f"{engine}-{dtype}-{number}"
                    words = [engine, dtype, model, path, output, asked.batch, asked.steps, asked.tokens]
                    program = [sys.executable, __file__, "--one", *map(str, words)]
                    threads = {"OMP_NUM_THREADS": str(asked.threads)}
                    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
                    if done.returncode:
                        raise SystemExit(f"{engine} in {dtype} ended with exit code {done.returncode}")
                    one = json.loads(done.stdout.splitlines()[-1])
                    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
                    what = {"rows": "gsm8k" if data else "made-up", "size": asked.size, "batch": asked.batch}
                    made.append({**one, **what, "tokens_per_pack": asked.tokens, "round": number, "load": load})
                    with asked.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(made[-1]) + "\n")
    return made


def table(made: list[dict[str, Any]]) -> list[str]:
    """One line for each engine and format."""
    lines = ["| engine | format | useful tokens/s | tokens per processor second | first step | memory |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for dtype in dict.fromkeys(one["dtype"] for one in made):
        for engine in ENGINES:
            some = [one for one in made if (one["engine"], one["dtype"]) == (engine, dtype)]
            wall, busy = ([one["tokens"] / one[key] for one in some] for key in ("seconds", "processor_seconds"))
            first = statistics.median(one["first_step_seconds"] for one in some)
            memory = statistics.median(one["memory_gib"] for one in some)
            lines.append(
                f"| {engine} | {dtype} | {_spread(wall)} | {_spread(busy)} | {first:.1f} s | {memory:.2f} GiB |"
            )
    return lines


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=8, help=argparse.SUPPRESS)
    parser.add_argument("--size", default="28m", help="of the model: tiny, 28m, 158m")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048, help="most tokens of a pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch; JAX takes all cores that the process may use")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("second_engine.jsonl"))
    asked = parser.parse_args()
    if asked.one:
        engine, dtype, model, rows, output, *numbers = asked.one
        print(json.dumps(train(engine, dtype, model, rows, output, *map(int, numbers))))
        return
    print("\n".join(table(measure(asked))))


if __name__ == "__main__":
    main()
