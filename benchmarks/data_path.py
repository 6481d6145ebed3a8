"""How fast rows become packs, and a run begins: `python benchmarks/data_path.py` prints five tables.

    tokenise   rows of a JSONL file to packs from a cold cache, against the tokenizer's own batch encoding of the same
               text with the same number of threads; and a second run, from the cache
    trl        the same with every core, against TRL: until the data set of its trainer is ready
    defaults   the same as `trl` with the number of processes unset: TRL takes one, we take one for each core
    packing    one million samples of chat-like lengths, all at once and step by step
    startup    from the command to the first step, against importing torch and transformers and loading the model

Each side runs in a process of its own, the sides in turn (A B A B ...); where libraries count, their import does not,
but in `startup`. The ratio is that of the medians, with the range of the ratios round by round. Each process appends a
line to data_path.jsonl. Rows are GSM8K's from the folder named by TRAINING_HUB_TEST_DATA, else made up.
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
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from materials import MARKED_TEMPLATE, gsm8k, made_up, make_model, texts_of, write_rows

HERE = Path(__file__).parent
PACKAGES = ("tokenizers", "transformers", "trl", "datasets", "torch", "numpy")
TABLES = ("tokenise", "trl", "defaults", "packing", "startup")
UNSET = 0
SAMPLES_PER_STEP, TOKEN_BUDGET = 256, 8192


def raw(folder: Path, threads: int) -> dict[str, Any]:
    """The tokenizer's own batch encoding of the rendered rows."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(folder / "model")
    rows = (json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines())
    texts = [template.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    tokenizer = Tokenizer.from_file(str(folder / "model/tokenizer.json"))
    clock = Clock()
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return {**clock.read(), "tokens": sum(len(one) for one in encoded), "threads": threads}


def ours(folder: Path, threads: int) -> dict[str, Any]:
    """Rows to packs of a whole epoch, first with an empty cache and then again; one thread is no further process.

    UNSET threads: as many processes as by default.
    """
    from training_hub.data.feed import Feed, FeedSettings
    from training_hub.data.prepare import prepare
    from training_hub.data.templates import resolve_template
    from training_hub.data.tokenizer import ChatTokenizer
    from training_hub.monitoring.console import SilentConsole
    from training_hub.recipe import Recipe

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        data: dict[str, Any] = {"path": str(folder / "rows.jsonl"), "cache_dir": cache}
        if threads != UNSET:
            data["workers"] = threads if threads > 1 else 0
        described = {"output": "out", "model": {"path": str(folder / "model")}, "training": {"max_seq_len": 4096}}
        recipe = Recipe.model_validate({**described, "data": data})
        tokenizer = ChatTokenizer.load(recipe.model.path)
        template = resolve_template(None, tokenizer)

        def rows_to_packs() -> dict[str, Any]:
            clock = Clock()
            prepared = prepare(recipe, tokenizer=tokenizer, template=template, console=SilentConsole())
            feed = Feed(prepared.train, FeedSettings(SAMPLES_PER_STEP, TOKEN_BUDGET, seed=0, epochs=1))
            packs = sum(len(feed.batch(step).packs) for step in range(1, feed.total_steps + 1))
            return {**clock.read(), "tokens": prepared.report["tokens"], "packs": packs}

        cold, warm = rows_to_packs(), rows_to_packs()
    return {**cold, "threads": threads, "warm_seconds": warm["seconds"]}


def trl(folder: Path, threads: int) -> dict[str, Any]:
    """What TRL does with the same rows until the trainer's data set is ready; the model is loaded before."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = MARKED_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        clock = Clock()
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=cache)
        arguments = SFTConfig(
            output_dir=cache,
            max_length=4096,
            assistant_only_loss=True,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            dataset_num_proc=threads if threads > 1 else None,
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        measured = {**clock.read(), "threads": threads}
        return {**measured, "tokens": sum(len(ids) for ids in trainer.train_dataset["input_ids"])}


def packing(folder: Path, threads: int) -> dict[str, Any]:
    """A million lengths as in chats (lognormal, median 270 tokens), placed all at once and step by step."""
    import numpy as np

    from training_hub.data.packing import assign

    lengths = np.random.default_rng(0).lognormal(5.6, 0.9, size=1_000_000).clip(4, 4096).astype(int)
    clock = Clock()
    rows = assign(lengths.tolist(), TOKEN_BUDGET)
    whole = {**clock.read(), "fill": lengths.sum() / (len(rows) * TOKEN_BUDGET), "tokens": int(lengths.sum())}
    by_step = {}
    for samples in (64, 256, 1024):
        steps = [lengths[start : start + samples].tolist() for start in range(0, 100 * samples, samples)]
        packs = sum(len(assign(step, TOKEN_BUDGET)) for step in steps)
        by_step[samples] = sum(map(sum, steps)) / (packs * TOKEN_BUDGET)
    return {**whole, "fill_by_samples_per_step": by_step, "threads": threads}


def by_hand(folder: Path) -> list[str]:
    """The command that imports torch and transformers and loads tokenizer and model."""
    load = (
        "import torch, transformers; "
        f"transformers.AutoTokenizer.from_pretrained({str(folder / 'tiny')!r}); "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(folder / 'tiny')!r})"
    )
    return [sys.executable, "-c", load]


def command(folder: Path, out: Path, *settings: str) -> list[str]:
    """The command that trains."""
    given = {"model": folder / "tiny", "data": folder / "few.jsonl", "output": out}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "training_hub", "sft", *words, "--training.steps=2", "--no-data.cache", *settings]


def startup(folder: Path, settings: Sequence[str]) -> dict[str, float]:
    """Seconds of both, and of processor time: until the process ends, and until the first step is in metrics.jsonl."""
    seconds = {}
    clock = Clock()
    subprocess.run(by_hand(folder), check=True, capture_output=True, env=environment(1))
    seconds["by hand"], seconds["by hand, processor"] = clock.read().values()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        metrics = Path(out) / "run" / "metrics.jsonl"
        clock = Clock()
        log = (Path(out) / "log").open("w+")
        process = subprocess.Popen(
            command(folder, metrics.parent, *settings), stdout=log, stderr=log, env=environment(1)
        )
        while not (metrics.is_file() and metrics.stat().st_size):
            if process.poll():
                raise SystemExit(Path(log.name).read_text("utf-8")[-3000:])
            time.sleep(0.005)
        seconds["ours"] = clock.read()["seconds"]
        seconds["ours, processor"] = spent_by(process.pid)
        process.wait()
        log.close()
    return seconds


def spent_by(pid: int) -> float:
    """Processor seconds of a running process and its ended children, from proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


class Clock:
    """Seconds since it was made, and processor seconds of this process and its ended children."""

    def __init__(self) -> None:
        self._began, self._spent = time.perf_counter(), self._processor()

    def _processor(self) -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def read(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self._began, "processor_seconds": self._processor() - self._spent}


SIDES: dict[str, Callable[[Path, int], dict[str, Any]]] = {"raw": raw, "ours": ours, "trl": trl, "packing": packing}


def environment(threads: int) -> dict[str, str]:
    always = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    counts = {
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }
    left = {name: value for name, value in os.environ.items() if name not in counts}
    return {**left, **always, **({} if threads == UNSET else counts)}


def run_side(side: str, folder: Path, threads: int) -> dict[str, Any]:
    words = [sys.executable, str(HERE / "data_path.py"), "--side", side, str(folder), str(threads)]
    done = subprocess.run(words, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(
    title: str, folder: Path, sides: Sequence[str], threads: int, rounds: int, keep: Callable[..., None]
) -> None:
    """One line: the seconds of both sides, and how much of the first one's time the second one takes."""
    made: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            made[side].append(run_side(side, folder, threads))
            keep(title, side, made[side][-1])
    first, second = (made[side] for side in sides)
    cells = [f"{side} {spread([one['seconds'] for one in made[side]])} s" for side in sides]
    for name in ("seconds", "processor_seconds"):
        ratios = [a[name] / b[name] for a, b in zip(first, second, strict=True)]
        median = statistics.median(a[name] for a in first) / statistics.median(b[name] for b in second)
        cells.append(f"ratio of {name} {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    warm = [one["warm_seconds"] for one in made["ours"]]
    how = f"{threads} thread(s)" if threads != UNSET else "as by default"
    print(f"{title}, {how}: {'; '.join(cells)}; ours again, from the cache {spread(warm)} s", flush=True)


def main() -> None:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("tables", nargs="*", default=TABLES)
    reader.add_argument("--rounds", type=int, default=5)
    options, settings = reader.parse_known_args()  # what is left are settings of the run in `startup`
    test_data = os.environ.get("TRAINING_HUB_TEST_DATA")
    rows = gsm8k(Path(test_data)) if test_data else made_up(7473)
    facts = {
        "rows": f"{len(rows)} {'of GSM8K' if test_data else 'made up'}",
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }

    def keep(table: str, side: str, measured: dict[str, Any]) -> None:
        with (HERE / "data_path.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, "side": side, **measured, **facts}) + "\n")

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_model(folder / "model", "28m", texts_of(rows))
        make_model(folder / "tiny", "tiny", texts_of(rows[:200]))
        write_rows(folder / "rows.jsonl", rows)
        write_rows(folder / "few.jsonl", rows[:64])
        if "tokenise" in options.tables:
            for threads in (1, 2):
                compare("tokenise", folder, ("raw", "ours"), threads, options.rounds, keep)
        if "trl" in options.tables:
            compare("trl", folder, ("trl", "ours"), os.cpu_count() or 1, max(2, options.rounds // 2), keep)
        if "defaults" in options.tables:
            compare("defaults", folder, ("trl", "ours"), UNSET, max(2, options.rounds // 2), keep)
        if "packing" in options.tables:
            found = [run_side("packing", folder, 1) for _ in range(options.rounds)]
            for one in found:
                keep("packing", "ours", one)
            steps = ", ".join(f"{float(fill):.1%} of {n}" for n, fill in found[0]["fill_by_samples_per_step"].items())
            seconds = spread([one["seconds"] for one in found])
            print(f"packing a million samples: {seconds} s, fill {found[0]['fill']:.2%}; in steps: {steps} samples")
        if "startup" in options.tables:
            begun = [startup(folder, settings) for _ in range(options.rounds)]
            for one in begun:
                keep("startup", "both", {**one, "settings": settings})
            cells = [f"{side} {spread([one[side] for one in begun])} s" for side in ("by hand", "ours")]
            for what in ("", ", processor"):
                ratio = spread([one[f"ours{what}"] / one[f"by hand{what}"] for one in begun])
                cells.append(f"ratio{what} {ratio}")
            print(f"startup: {'; '.join(cells)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        name, place, count = sys.argv[2:5]
        print(json.dumps(SIDES[name](Path(place), int(count))))
    else:
        main()
