"""Ours against others: `python benchmarks/compare.py gsm8k-28m` prints one table; without a case, all of them.

Each side trains in a process of its own, the sides in turn (A B A B ...), on the same weights and rows, with the same
learning rate, number format and threads. The ratio is that of the medians of the rounds; its spread is the range of
the ratios round by round. By processor time the same is said of tokens per second that all threads together spent on a
processor, which other work on the machine hardly changes. What each process did is appended to results.jsonl, and
RESULTS.md is written from it. GSM8K and the short rows are read from the folder named by TRAINING_HUB_TEST_DATA;
without it made-up rows stand in, and are named so. Sides whose package is not installed are left out, and that is said.
`trl` is TRL with its defaults, `trl-kept` the same with an allocator that keeps large blocks, `trl-unchecked` that
without activation checkpointing, `trl-best` that with packing too (the fastest with AMX, not without),
`transformers` the plain Trainer.

Fraction of peak: operations that the tokens need (6 for each weight and token, in the head only for trained tokens,
and attention between tokens of a sample that see each other), per second, over the best rate of a matrix product
measured in the same processes with the same number format and threads.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from materials import gsm8k, instructions, long_chats, made_up, make_model, texts_of, write_rows

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "trl", "tokenizers", "numpy")
RESULTS = "results.jsonl"
# Large blocks are kept by the process instead of being returned to the system and faulted in again.
KEPT_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
NEEDS = {
    "ours": "torch",
    "trl": "trl",
    "trl-kept": "trl",
    "trl-unchecked": "trl",
    "trl-best": "trl",
    "transformers": "accelerate",
}
ALLOCATORS = dict.fromkeys(("trl-kept", "trl-unchecked", "trl-best"), KEPT_BLOCKS)
"""By side: the environment of its allocator. The best that TRL can do includes what it gains from this."""
MAIN_SIDES = ("ours", "trl", "trl-unchecked")


@dataclass(frozen=True)
class Case:
    """A table: which model on which rows, with what batch and longest sample, in how many steps by which sides.

    Sizes are such that all tables together take two quiet cores half an hour.
    """

    size: str
    rows: str
    batch: int
    max_length: int
    steps: int = 4
    sides: tuple[str, ...] = MAIN_SIDES


CASES = {
    "gsm8k-28m": Case("28m", "gsm8k", 16, 1024, 6, tuple(NEEDS)),
    "gsm8k-158m": Case("158m", "gsm8k", 8, 1024),
    "large-vocabulary": Case("large-vocabulary", "gsm8k", 8, 1024),
    "short-rows": Case("28m", "instructions", 48, 1024),
    "long-chats": Case("28m", "long-chats", 4, 2048),
}
TINY = Case("tiny", "made-up", 4, 256, sides=tuple(NEEDS))


def main() -> None:
    options = read_options()
    present = [side for side in NEEDS if find_spec(NEEDS[side])]
    for side in set(options.sides or NEEDS) - set(present):
        print(f"{side} is left out: {NEEDS[side]} is not installed", file=sys.stderr)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="training-hub-bench-") as scratch:
        for name in options.cases or CASES:
            made = run_case(name, present, Path(options.folder or scratch), options)
            with (output / RESULTS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(one) + "\n" for one in made)
            print("\n".join(table(made)))
    (output / "RESULTS.md").write_text(page(output / RESULTS), encoding="utf-8")


def run_case(name: str, present: Sequence[str], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each side and round, with what is needed to repeat it. `present` are the sides that can run."""
    case = TINY if options.tiny else CASES[name]
    sides = [side for side in options.sides or case.sides if side in present]
    steps = options.steps or case.steps
    name = "tiny" if options.tiny else name
    folder.mkdir(parents=True, exist_ok=True)
    rows, source = rows_of(case.rows)
    data = write_rows(folder / f"{case.rows}.jsonl", rows)
    model = make_model(folder / case.size, case.size, texts_of(rows))
    facts = {
        "run": time.strftime("%Y-%m-%d %H:%M:%S"),
        "case": name,
        "rows": source,
        "dtype": options.dtype,
        "steps": steps,
        "batch": case.batch,
        "max_length": case.max_length,
        "processor": processor(),
        "versions": versions(),
    }
    made = []
    for number in range(options.rounds):
        for side in sides:
            order = {
                "model": str(model),
                "data": str(data),
                "out": str(folder / f"out-{name}-{side}-{number}-{os.getpid()}"),
                "steps": steps,
                "batch": case.batch,
                "max_length": case.max_length,
                "dtype": options.dtype,
                "overrides": json.loads(options.overrides) if side == "ours" else {},
            }
            one = {**facts, "round": number, **run_side(side, order, folder / "order.json", options.threads)}
            print(f"{name} round {number + 1}: {side}: {one['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
            made.append(one)
    return made


def rows_of(name: str) -> tuple[list[dict[str, Any]], str]:
    """The rows, and what they are: `name`, or that they are made up."""
    test_data = os.environ.get("TRAINING_HUB_TEST_DATA")
    if name == "long-chats":
        return long_chats(), "made up"
    if name == "made-up" or not test_data:
        return made_up(), "made up"
    return (gsm8k if name == "gsm8k" else instructions)(Path(test_data)), name


def run_side(side: str, order: dict[str, Any], file: Path, threads: int) -> dict[str, Any]:
    file.write_text(json.dumps(order), encoding="utf-8")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(file.parent / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        **ALLOCATORS.get(side, {}),
    }
    command = [sys.executable, str(HERE / "side.py"), side, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(made: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The records of one run of one case as a Markdown table."""
    first, peak = made[0], max(one["peak"] for one in made)
    by_side: dict[str, list[dict[str, Any]]] = {}
    for one in made:
        by_side.setdefault(one["side"], []).append(one)
    yield f"### {first['case']}, {first['dtype']}"
    yield ""
    yield (
        f"{first['rows']} rows, {first['batch']} samples a step, {first['steps']} steps, "
        f"{len(by_side['ours'])} rounds, {first['threads']} threads; a matrix product reaches {peak / 1e9:,.0f} "
        "GFLOP/s."
    )
    yield ""
    yield (
        "| side | useful tokens/s (range) | trained tokens/s | padded | of peak | memory GiB | loss first, last "
        "| ours is faster by (range) | by processor time | allocator |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for side, rounds in by_side.items():
        yield _row(side, rounds, by_side["ours"], peak)
    yield ""


def _row(side: str, rounds: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], peak: float) -> str:
    rates = [one["tokens_per_second"] for one in rounds]
    cells = [
        side,
        f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
        f"{statistics.median(one['trained_tokens_per_second'] for one in rounds):,.0f}",
        f"{rounds[0]['padded_fraction']:.0%}",
        f"{statistics.median(one['operations_per_second'] for one in rounds) / peak:.1%}",
        f"{max(one['peak_memory_gib'] for one in rounds):.2f}",
        f"{rounds[0]['losses'][0]:.4f}, {rounds[0]['losses'][-1]:.4f}",
        _ratio(ours, rounds, "tokens_per_second"),
        _ratio(ours, rounds, "tokens_per_processor_second"),
        rounds[0]["allocator"],
    ]
    return f"| {' | '.join(cells)} |"


def _ratio(ours: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]], name: str) -> str:
    """The ratio of medians, and the range of the ratios round by round; nothing for runs before it was measured."""
    if any(name not in one for one in (*ours, *rounds)):
        return ""
    mine, theirs = [one[name] for one in ours], [one[name] for one in rounds]
    ratios = [first / second for first, second in zip(mine, theirs, strict=True)]
    return f"{statistics.median(mine) / statistics.median(theirs):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def page(results: Path) -> str:
    """RESULTS.md: the newest run of each case and number format."""
    newest: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        place = one["case"], one["dtype"]
        if place not in newest or newest[place][0]["run"] != one["run"]:
            newest[place] = []
        newest[place].append(one)
    lines = ["# Side by side", "", *(__doc__ or "").strip().splitlines()[2:], ""]
    for made in newest.values():
        lines += table(made)
        told = ", ".join(f"{name} {number}" for name, number in made[0]["versions"].items())
        lines += [f"{made[0]['run']}, {made[0]['processor']}; {told}.", ""]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name and cores, and whether it multiplies bfloat16 in matrix units."""
    import torch

    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    units = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    return f"{name}, {os.cpu_count()} cores, {units}"


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all where none is named")
    reader.add_argument("--sides", nargs="+", choices=list(NEEDS), help="those of the case where none is named")
    reader.add_argument("--tiny", action="store_true", help="a tiny model: tries the script, measures nothing")
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--steps", type=int, help="those of the case where not given; the first two warm up")
    reader.add_argument("--threads", type=int, default=os.cpu_count())
    reader.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    reader.add_argument("--overrides", default="{}", help="settings of ours by path, as JSON")
    reader.add_argument("--folder", help="where models and runs go; a temporary folder where not given")
    reader.add_argument("--output", default=str(HERE), help=f"folder of {RESULTS} and RESULTS.md")
    options = reader.parse_args()
    unknown = [name for name in options.cases if name not in CASES]
    if unknown or "ours" not in (options.sides or MAIN_SIDES):
        reader.error(f"cases are {', '.join(CASES)}, and sides include ours; got {unknown or options.sides}")
    return options


if __name__ == "__main__":
    main()
