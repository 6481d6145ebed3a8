"""Break runs on purpose and count how they take it: python -m tests.campaigns [--tenth] [--only X] [--write FOLDER].

Every case is seeded, but what a kill hits depends on the moment, as it does in life. The full campaign takes about half
an hour on one core; --tenth takes a tenth of every family.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random

# Read once, when the libraries are imported; a forked process must not inherit threads.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)  # fmt: skip

from tests.campaigns import damage, disks, kills, numbers, workers
from tests.campaigns.case import Case, table
from tests.campaigns.workshop import Workshop

SEED = 20261121
SECONDS_BETWEEN = 20
Family = Callable[[Workshop, int, Random], Iterator[Case]]

# Family: cases of the full campaign, and of the tenth (fewer where one of them takes seconds).
FAMILIES: dict[str, tuple[Family, int, int]] = {
    "kills_at_random": (kills.kills_at_random, 200, 10),
    "kills_at_every_call": (kills.kills_at_every_call, 350, 5),  # all there are, in two windows
    "signals": (kills.signals, 100, 8),
    "dead_workers": (workers.dead_workers, 50, 5),
    "corruption": (damage.corruption, 360, 18),
    "wrong_folders": (damage.wrong_folders, 50, 10),
    "shuffled_times": (damage.shuffled_times, 20, 1),
    "disk_full": (disks.disk_full, 40, 3),
    "retention": (disks.retention, 50, 4),
    "two_at_once": (disks.two_at_once, 20, 2),
    "bad_outputs": (disks.bad_outputs, 27, 9),
    "not_finite": (numbers.not_finite, 60, 6),
    "wrong_resumes": (numbers.wrong_resumes, 20, 4),
    "fresh_processes": (numbers.fresh_processes, 20, 0),
    "resumes": (numbers.resumes, 200, 8),
}


def main(words: list[str] | None = None) -> int:
    asked = _arguments().parse_args(words)
    chosen = {name: what for name, what in FAMILIES.items() if asked.only in name}
    counts = {name: tenth if asked.tenth else full for name, (_, full, tenth) in chosen.items()}
    cases: list[Case] = []
    seconds: dict[str, float] = {}
    progress = Progress(sum(counts.values()))
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        for name, (family, _, _) in chosen.items():
            start = time.monotonic()
            shop = Workshop(Path(root) / name)
            found = []
            for case in family(shop, counts[name], Random(f"{asked.seed} {name}")):
                case = dataclasses.replace(case, happened=case.happened.replace(root, "FOLDER"))
                found.append(case)
                progress.say(name, len(cases) + len(found))
                if case.happened:
                    print(f"  {case.verdict}: {case.family}: {case.fault}: {case.happened}", flush=True)
            cases += found
            elapsed = time.monotonic() - start
            if found:
                seconds[found[0].family] = elapsed
            print(f"{name}: {len(found)} cases in {elapsed:.0f} s", flush=True)
            shutil.rmtree(shop.root)
    text = table(cases, seconds)
    print(f"\n{text}")
    if asked.write:
        write(Path(asked.write), cases, text, asked.seed)
    return int(any(case.happened for case in cases))


class Progress:
    """A line every SECONDS_BETWEEN seconds with what is done and the time left, from the cases so far."""

    def __init__(self, total: int):
        self.total, self.began = total, time.monotonic()
        self.said = self.began

    def say(self, family: str, done: int) -> None:
        now = time.monotonic()
        if now - self.said < SECONDS_BETWEEN:
            return
        self.said = now
        minutes = (now - self.began) / done * max(0, self.total - done) / 60
        print(f"{family}: {done:,} of about {self.total:,} cases, about {minutes:.0f} min left", flush=True)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("--tenth", action="store_true", help="a tenth of each family")
    parser.add_argument("--only", default="", help="families with these letters in their name")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--write", default="", metavar="FOLDER", help="put RESULTS.md and results.jsonl there")
    return parser


INCUMBENT = """\
## The incumbent, for comparison

Hugging Face Trainer 5.23 (TRL 1.16), torch 2.13.0, a Llama of 260 K parameters on two cores. Measured outside this
repository, which does not hold the scripts, so these figures are not from the run above.

| fault | cases | what happened |
|---|---:|---|
| kill -9 at random times, save every step | 100 | 30 left a broken newest checkpoint; 29 of 29 restarts crashed |
| kill -9 at random times, save every 10 steps | 40 | 2 left a broken newest checkpoint; 2 of 2 restarts crashed |
| one bit flipped in model.safetensors | 10 | 10 loaded silently, other final weights |
| one bit flipped in optimizer.pt | 10 | 10 loaded silently, 7 with other final weights |
| optimizer.pt or scheduler.pt deleted, weights of another run | 3 | 3 silent |
| a file cut | 3 | 3 found, as raw errors; no fall-back to the older checkpoint |
| disk full | 1 | raw error, half a checkpoint left; the next start crashes |
| SIGTERM, default settings | 1 | dies without a checkpoint |
| weights become NaN | 1 | runs to the end, logs loss 0.0, saves NaN, exit 0 |
"""


def write(folder: Path, cases: list[Case], text: str, seed: int) -> None:
    """RESULTS.md for readers, results.jsonl with every case for programs."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"seed": seed, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), **_versions()}
    named = ", ".join(f"{name} {value}" for name, value in facts.items())
    wrong = [f"- {case.family}: {case.fault}: {case.happened}" for case in cases if case.happened]
    (folder / "RESULTS.md").write_text(
        "# Faults injected, and what became of the run\n\n`make campaign` writes this page; every case is a line of "
        f"results.jsonl. Made with {named}.\n\n{text}\n\n"
        + ("Not as wanted:\n\n" + "\n".join(wrong) + "\n\n" if wrong else "No case needed a repair by hand.\n\n")
        + INCUMBENT,
        encoding="utf-8",
    )
    lines = [facts, *({**dataclasses.asdict(case), "verdict": case.verdict} for case in cases)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in ("torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


if __name__ == "__main__":
    sys.exit(main())
