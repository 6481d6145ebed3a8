"""The jax engine against the torch engine and EasyDeL's trainer: `python benchmarks/second_engine.py` prints one table.

All train the same weights on the same rows in the same order, with the same learning rate and number format, each in a
process of its own, in turn (A B C A B C ...). EasyDeL is run by the Python of an environment of its own, since its
versions of libraries are others: `--easydel PATH/TO/bin/python`. Without it that side is left out, and that is said.

    python -m venv easydel_venv
    easydel_venv/bin/pip install easydel==0.3.0 pillow
    easydel_venv/bin/pip install torch==2.13.0  # it reads weights; a CPU build will do
    python benchmarks/second_engine.py --easydel easydel_venv/bin/python

The first two steps, in which programs are compiled and kernels built, are left out. Useful tokens are those of samples,
padding is none. Told are tokens per second, and per second that all threads together spent on a processor, which other
work on the machine hardly changes; the median of the rounds and their range. `jax is faster by` is the ratio of the
medians, and the range of the ratios round by round. GSM8K is read from the folder named by TRAINING_HUB_TEST_DATA;
without it made-up rows stand in. Rows longer than --max-length are left out. What each process did is appended to
results.jsonl, and RESULTS.md is written from it.

EasyDeL is compared in the one configuration in which its SFT path trains what it is asked to: packing off (on, it
crashes by default, and trains on padding otherwise), loss on the assistant's tokens, every row padded to --max-length,
float32 weights, products in the format of the row. It rounds weights to float16 as it reads them, so its first loss is
near ours and not the same; it divides the loss by the wrong number of tokens (benchmarks/easydel_side.py), and is told
here divided by the right one. None of the sides clips gradients or decays weights, so that AdamW's steps do not depend
on what the loss is divided by.
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
from itertools import islice
from pathlib import Path
from typing import Any

from materials import gsm8k, made_up, make_model, texts_of, write_rows

HERE = Path(__file__).parent
ENGINES = ("torch", "jax")
RIVAL = "easydel"
LEFT_OUT = 2
LEARNING_RATE = 1e-4


def train(order: dict[str, Any]) -> dict[str, Any]:
    """One run in this process: tokens, seconds, seconds of processor and losses of the steps that count."""
    from training_hub.backends import Given
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    marks: list[tuple[int, float, float]] = []

    def note(report: Any) -> None:
        marks.append((report.tokens, time.perf_counter(), time.process_time()))

    recipe = {
        "backend": order["engine"],
        "output": order["output"],
        "model": {"path": order["model"], "dtype": order["dtype"]},
        "data": {"path": order["data"], "cache": False, "shuffle": False},
        "optimizer": {"lr": order["learning_rate"], "weight_decay": 0.0, "beta2": 0.999},
        "lr_scheduler": {"name": "constant"},
        "training": {
            "steps": order["steps"],
            "global_batch_size": order["batch"],
            "max_seq_len": order["max_length"],
            "max_tokens_per_gpu": order["tokens"],
            "max_norm": 0.0,
            "preflight": False,
            "activation_checkpointing": "none",
        },
        "checkpoint": {"minutes": None, "final": False},
        "monitoring": {"console": "off"},
    }
    result = run(Recipe.model_validate(recipe), Given(watchers=[note]))
    left_out = order["left_out"]
    _, began, busy = marks[left_out - 1]
    rows = result.history[left_out:]
    return {
        "tokens": sum(row["tokens"] for row in rows),
        "trained_tokens": sum(row["trained_tokens"] for row in rows),
        "padded_fraction": sum(row.get("padded_fraction", 0.0) for row in rows) / len(rows),
        "seconds": marks[-1][1] - began,
        "processor_seconds": marks[-1][2] - busy,
        "first_step_seconds": result.history[0]["step_seconds"],
        "memory_gib": result.metrics["memory_gib"],
        "losses": [row["loss"] for row in result.history],
        "versions": result.versions,
    }


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Every side in every format, round by round, each in a process of its own."""
    data = os.environ.get("TRAINING_HUB_TEST_DATA")
    rows = gsm8k(Path(data)) if data else made_up()
    facts = {
        "run": time.strftime("%Y-%m-%d %H:%M:%S"),
        "rows": "gsm8k" if data else "made-up",
        "size": asked.size,
        "batch": asked.batch,
        "max_length": asked.max_length,
        "tokens_per_pack": asked.tokens,
        "threads": asked.threads,
        "processor": processor(),
    }
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", asked.size, texts_of(rows))
        # Twice what is trained, so that no side comes to the end of an epoch.
        fitting = list(islice(_fitting(rows, model, asked.max_length), 2 * asked.batch * asked.steps))
        path = write_rows(Path(folder) / "rows.jsonl", fitting)
        for number in range(asked.rounds):
            for dtype in asked.dtype:
                for engine in asked.sides:
                    order = {
                        "engine": engine,
                        "dtype": dtype,
                        "model": str(model),
                        "data": str(path),
                        "output": str(Path(folder) / f"{engine}-{dtype}-{number}"),
                        "batch": asked.batch,
                        "steps": asked.steps,
                        "tokens": asked.tokens,
                        "max_length": asked.max_length,
                        "learning_rate": LEARNING_RATE,
                        "left_out": LEFT_OUT,
                    }
                    one = run_side(order, asked, Path(folder) / "order.json")
                    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
                    made.append({**facts, "engine": engine, "dtype": dtype, "round": number, "load": load, **one})
                    print(
                        f"round {number + 1}, {dtype}, {engine}: {one['tokens'] / one['seconds']:,.0f} tokens/s, "
                        f"{one['tokens'] / one['processor_seconds']:,.0f} per processor second",
                        file=sys.stderr,
                    )
    return made


def _fitting(rows: Sequence[dict[str, Any]], model: Path, most: int) -> Iterator[dict[str, Any]]:
    """The rows of at most so many tokens: longer ones are cut by one side and refused by another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in rows:
        if len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]) <= most:
            yield row


def run_side(order: dict[str, Any], asked: argparse.Namespace, file: Path) -> dict[str, Any]:
    """What one side says of its run, in a process of its own on as many cores as asked."""
    file.write_text(json.dumps(order), encoding="utf-8")
    is_rival = order["engine"] == RIVAL
    script = [asked.easydel, str(HERE / "easydel_side.py")] if is_rival else [sys.executable, __file__, "--one"]
    environment = {
        **{name: value for name, value in os.environ.items() if not (is_rival and name == "PYTHONPATH")},
        "OMP_NUM_THREADS": str(asked.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Each process compiles what it runs, as the first run of a user does.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    cores = cores_of(asked.threads)
    done = subprocess.run(
        [*script, str(file)],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )
    if done.returncode:
        raise SystemExit(f"{order['engine']} in {order['dtype']} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cores_of(count: int) -> set[int]:
    """So many of the cores that this process may use, since JAX takes all that it is given; empty for all."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    mine = sorted(os.sched_getaffinity(0))
    return set(mine[-count:]) if count < len(mine) else set()


def table(made: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The records of one run, one line for each side and format."""
    first = made[0]
    yield (
        f"{first['run']}: {first['rows']} rows, model {first['size']}, {first['batch']} samples a step of at most "
        f"{first['max_length']} tokens, packs of {first['tokens_per_pack']}, "
        f"{1 + max(one['round'] for one in made)} rounds, {first['threads']} threads; {first['processor']}."
    )
    yield ""
    yield (
        "| engine | format | useful tokens/s | per processor second | padded | first step | loss first, last "
        "| jax is faster by | by processor time |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for dtype in dict.fromkeys(one["dtype"] for one in made):
        of_jax = [one for one in made if (one["engine"], one["dtype"]) == ("jax", dtype)]
        for engine in dict.fromkeys(one["engine"] for one in made):
            yield _row([one for one in made if (one["engine"], one["dtype"]) == (engine, dtype)], of_jax)
    yield ""
    for engine, told in {one["engine"]: one["versions"] for one in made}.items():
        yield f"- {engine}: " + ", ".join(f"{name} {number}" for name, number in told.items())


def _row(some: Sequence[dict[str, Any]], of_jax: Sequence[dict[str, Any]]) -> str:
    cells = [some[0]["engine"], some[0]["dtype"], *(_spread(_rates(some, key)) for key in CLOCKS)]
    cells.append(f"{some[0]['padded_fraction']:.0%}")
    cells.append(f"{statistics.median(one['first_step_seconds'] for one in some):.1f} s")
    cells.append(f"{some[0]['losses'][0]:.4f}, {some[0]['losses'][-1]:.4f}")
    for key in CLOCKS:
        ratios = [mine / other for mine, other in zip(_rates(of_jax, key), _rates(some, key), strict=False)]
        middle = statistics.median(_rates(of_jax, key)) / statistics.median(_rates(some, key)) if of_jax else None
        cells.append("" if middle is None else f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


CLOCKS = ("seconds", "processor_seconds")


def _rates(some: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [one["tokens"] / one[key] for one in some]


def _spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def page(results: Path) -> str:
    """RESULTS.md: the newest run of each size of model."""
    newest: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        place = one["size"], one["threads"]
        if place not in newest or newest[place][0]["run"] != one["run"]:
            newest[place] = []
        newest[place].append(one)
    lines = ["# A second engine: what it costs and what it is worth", "", *(__doc__ or "").strip().splitlines()[2:]]
    for made in newest.values():
        lines += ["", *table(made)]
    return "\n".join([*lines, ""])


def processor() -> str:
    """The processor's name, its cores, and what it multiplies bfloat16 with."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = text.splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    units = [words for flag, words in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512_BF16")) if flag in flags]
    return f"{name}, {os.cpu_count()} cores, {' and '.join(units) or 'no units for bfloat16'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--easydel", help="the Python of an environment that has EasyDeL")
    parser.add_argument("--sides", nargs="+", choices=[*ENGINES, RIVAL], help="all that can run where not given")
    parser.add_argument("--size", default="28m", help="of the model: tiny, 28m, 158m")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens of a pack")
    parser.add_argument("--max-length", type=int, default=512, help="of a sample; EasyDeL pads all to it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="and cores, of each process")
    parser.add_argument("--output", type=Path, default=HERE / "second_engine", help="folder of the results")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(train(json.loads(asked.one.read_text(encoding="utf-8")))))
        return
    present = [*ENGINES, *([RIVAL] if asked.easydel else [])]
    asked.sides = [side for side in asked.sides or present if side in present]
    if not asked.easydel:
        print("easydel is left out: name a Python that has it with --easydel", file=sys.stderr)
    made = measure(asked)
    asked.output.mkdir(parents=True, exist_ok=True)
    with (asked.output / "results.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in made)
    (asked.output / "RESULTS.md").write_text(page(asked.output / "results.jsonl"), encoding="utf-8")
    print("\n".join(table(made)))


if __name__ == "__main__":
    main()
