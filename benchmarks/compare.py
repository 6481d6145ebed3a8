"""Ours against TRL: `python benchmarks/compare.py gsm8k-28m` prints one table and appends its rows to results.jsonl.

Each side trains in a process of its own, the sides in turn (A B A B ...), on the same weights, rows and number format.
The ratio is that of the medians of the rounds; its spread is the range of the ratios round by round. GSM8K and the
short rows are read from the folder named by TRAINING_HUB_TEST_DATA; without it made-up rows stand in, and are named so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from materials import gsm8k, instructions, long_chats, made_up, make_model, texts_of, write_rows

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "trl", "tokenizers", "numpy")


@dataclass(frozen=True)
class Case:
    """A row of the table: which model on which rows, with what batch and longest sample."""

    size: str
    rows: str
    batch: int
    max_length: int


CASES = {
    "gsm8k-28m": Case("28m", "gsm8k", 16, 1024),
    "gsm8k-158m": Case("158m", "gsm8k", 16, 1024),
    "large-vocabulary": Case("large-vocabulary", "gsm8k", 16, 1024),
    "short-rows": Case("28m", "instructions", 64, 1024),
    "long-chats": Case("28m", "long-chats", 8, 2048),
}


def main() -> None:
    options = read_options()
    case = CASES[options.case]
    folder = Path(options.folder or tempfile.mkdtemp(prefix="training-hub-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows, source = rows_of(case.rows)
    data = write_rows(folder / f"{case.rows}.jsonl", rows)
    model = make_model(folder / case.size, case.size, texts_of(rows))
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            made = run_side(side, model, data, folder / f"out-{side}-{number}", case, options)
            rounds[side].append(made)
            print(f"round {number + 1}: {side}: {made['tokens_per_second']:,.0f} useful tokens/s", file=sys.stderr)
    peak = matrix_product_peak(options.dtype, options.threads)
    print(table(options.case, rounds, peak))
    keep(options, source, rounds, peak)


def rows_of(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows, and what they are: `name`, or that they are made up."""
    test_data = os.environ.get("TRAINING_HUB_TEST_DATA")
    if name == "long-chats":
        return long_chats(), "made up"
    if not test_data:
        return made_up(), "made up"
    return (gsm8k if name == "gsm8k" else instructions)(Path(test_data)), name


def run_side(side: str, model: Path, data: Path, out: Path, case: Case, options: Any) -> dict[str, Any]:
    given = [str(value) for value in (model, data, out, options.steps, case.batch, case.max_length, options.dtype)]
    command = [sys.executable, str(HERE / "side.py"), side, *given]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def matrix_product_peak(dtype: str, threads: int) -> float:
    """The most floating-point operations per second, in units of 1e9, that a large matrix product reaches here."""
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.randn(2048, 2048, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best / 1e9


def table(case: str, rounds: dict[str, list[dict[str, Any]]], peak: float) -> str:
    lines = [
        f"{case}; matrix products reach {peak:,.0f} GFLOP/s here",
        "| side | useful tokens/s (median, range) | trained tokens/s | padded | peak GiB | loss first, last | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = [made["tokens_per_second"] for made in rounds["ours"]]
    for side, made in rounds.items():
        rates = [one["tokens_per_second"] for one in made]
        ratios = [mine / theirs for mine, theirs in zip(ours, rates, strict=True)]
        ratio = f"{statistics.median(ours) / statistics.median(rates):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(
            f"| {side} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
            f"| {statistics.median(one['trained_tokens_per_second'] for one in made):,.0f} "
            f"| {made[0]['padded_fraction']:.0%} | {max(one['peak_memory_gib'] for one in made):.2f} "
            f"| {made[0]['first_loss']:.4f}, {made[0]['last_loss']:.4f} | {ratio} |"
        )
    return "\n".join(lines)


def keep(options: Any, source: str, rounds: dict[str, list[dict[str, Any]]], peak: float) -> None:
    """Append one line per side and round to results.jsonl, with what is needed to repeat it."""
    facts = {
        "case": options.case,
        "rows": source,
        "dtype": options.dtype,
        "threads": options.threads,
        "steps": options.steps,
        "peak_gflops": round(peak, 1),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    with (HERE / "results.jsonl").open("a", encoding="utf-8") as file:
        for made in (one for side in rounds.values() for one in side):
            file.write(json.dumps({**facts, **made}) + "\n")


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("case", choices=CASES)
    reader.add_argument("--sides", nargs="+", default=["ours", "trl", "trl-best"], choices=["ours", "trl", "trl-best"])
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--steps", type=int, default=8)
    reader.add_argument("--threads", type=int, default=2)
    reader.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    reader.add_argument("--folder", help="where models and runs go; a temporary folder where not given")
    return reader.parse_args()


if __name__ == "__main__":
    main()
