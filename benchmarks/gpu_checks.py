"""All that waits for a GPU, in one command: `python benchmarks/gpu_checks.py --output FOLDER`.

Workloads with a target first; the tests, since a number of code that is wrong is worth nothing; then what tells where
time goes. Each check is a process of its own with a limit of its own: one that hangs or fails costs no other its turn.
While one has the GPU the next gets ready, which on a machine just started takes half a minute. All together end within
--seconds (540 by default), and what there was no time for is named. Everything that checks print, and the lines of
gpu.py and gpu_parts.py, are in FOLDER, written as they come: what a machine that is taken away had done is kept.

`--tiny` does the same with tiny models on whatever device there is. GPU.md says how to bring the packages along.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
LEAST_SECONDS = 20
"""Less than this is not worth beginning a check for."""

TESTS = (
    "tests/backends/torch_engine/fused/test_triton_kernels.py",
    "tests/backends/torch_engine/optimizers/test_triton_step.py",
    "tests/backends/torch_engine/test_cuda.py",
    "tests/backends/torch_engine/test_cuda_step.py",
    "tests/backends/torch_engine/test_attention.py",
    "tests/backends/torch_engine/fused/test_products.py",
    "tests/backends/torch_engine/fused/test_one_input.py",
    "tests/backends/torch_engine/fused/test_eight_bit.py",
    "tests/backends/torch_engine/optimizers/test_library.py",
)
"""Files with tests that need a GPU."""


@dataclass(frozen=True)
class Check:
    """A command, as words after `python`, and the seconds it may take. waits: whether it takes `--after FILE`."""

    name: str
    words: tuple[str, ...]
    seconds: int
    waits: bool = False


@dataclass(frozen=True)
class Begun:
    """A check whose process is there. It prints to `printed`, and has the GPU once `turn` is there."""

    check: Check
    process: subprocess.Popen[bytes]
    printed: Path
    turn: Path


@dataclass(frozen=True)
class Outcome:
    """How a check ended: `done`, `failed`, `took too long` or `not begun`; the last line it printed."""

    name: str
    ended: str
    seconds: float
    said: str


def checks(folder: Path, *, tiny: bool) -> list[Check]:
    """In the order in which they matter."""
    lines = ("--output", str(folder / "gpu.jsonl"))

    def trained(workload: str, *words: str, steps: int = 6, warm_up: int = 2) -> tuple[str, ...]:
        many = ("--steps", str(steps), "--warm-up", str(warm_up), *(("--tiny",) if tiny else ()))
        return ("benchmarks/gpu.py", workload, *many, *lines, *words)

    eight_bit = () if tiny else ("--set", "training.fp8=true")  # refused where there is no GPU that can
    short = ("--length", "1024", "--rows", "32", "--rows-at-once", "8")
    replayed = () if tiny else ("--set", "training.cuda_graphs=true")
    roomy = () if tiny else ("--rows", "33", "--rows-at-once", "3", "--set", "training.activation_checkpointing=none")
    workers = min(6, (os.cpu_count() or 1) // 2)
    side_by_side = ("-p", "xdist", "-n", str(workers)) if workers > 1 and find_spec("xdist") is not None else ()
    return [
        Check("8b-full", trained("8b-full"), 120, waits=True),
        Check("8b-lora", trained("8b-lora"), 100, waits=True),
        Check("1.7b-full", trained("1.7b-full", steps=10), 90, waits=True),
        Check("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", *side_by_side, *TESTS), 110),
        Check("8b-lora in 8 bits", trained("8b-lora", *eight_bit), 100, waits=True),
        Check("8b-full in 8 bits", trained("8b-full", *eight_bit), 120, waits=True),
        Check("8b-full in full packs", trained("8b-full", *roomy, steps=3, warm_up=1), 120, waits=True),
        Check("135m-full", trained("135m-full", *short, steps=12), 45, waits=True),
        Check("135m-full replayed", trained("135m-full", *short, *replayed, steps=12, warm_up=4), 60, waits=True),
        Check("8b-lora taken apart", trained("8b-lora", "--profile", "--rows", "4"), 75, waits=True),
        Check("8b-full taken apart", trained("8b-full", "--profile", "--rows", "2"), 75, waits=True),
        Check("1b-full", trained("1b-full", steps=10), 60, waits=True),
        Check(
            "parts",
            ("benchmarks/gpu_parts.py", "--output", str(folder / "parts.jsonl"), *(("--tiny",) if tiny else ())),
            90,
        ),
    ]


def begin(check: Check, folder: Path) -> Begun:
    """Let it get ready; one that does not wait for its turn must have it now."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a plug-in that warns would fail tests that take warnings for errors
        "PYTHONUNBUFFERED": "1",
    }
    printed, turn = (folder / f"{check.name.replace(' ', '-')}.{kind}" for kind in ("txt", "turn"))
    waiting = ("--after", str(turn)) if check.waits else ()
    with printed.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *check.words, *waiting],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Begun(check, process, printed, turn)


def finish(begun: Begun, seconds: float, log: Path) -> Outcome:
    """Give it the GPU, for at most so long; what it has printed goes to `log`."""
    began = time.monotonic()
    begun.turn.touch()
    try:
        ended = "failed" if begun.process.wait(timeout=seconds) else "done"
    except subprocess.TimeoutExpired:
        ended = "took too long"
    finally:
        end(begun.process)
        begun.turn.unlink()
    text = begun.printed.read_text(errors="replace")
    begun.printed.unlink()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {begun.check.name}: python {' '.join(begun.check.words)}\n{text}")
    said = text.strip().splitlines()
    return Outcome(begun.check.name, ended, time.monotonic() - began, said[-1].strip() if said else "")


def end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of it, so that the next check has the GPU to itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcomes_of(chosen: list[Check], folder: Path, ends_at: float) -> Iterator[Outcome]:
    """One after the other; `ends_at` by time.monotonic."""
    ready: Begun | None = None
    try:
        for check, following in zip(chosen, [*chosen[1:], None], strict=True):
            left = ends_at - time.monotonic()
            if left < LEAST_SECONDS:
                yield Outcome(check.name, "not begun", 0.0, "")
                continue
            begun, ready = ready or begin(check, folder), None
            if following is not None and following.waits:
                ready = begin(following, folder)
            yield finish(begun, min(left, check.seconds), folder / "log.txt")
    finally:
        if ready is not None:
            end(ready.process)
            ready.printed.unlink()


def line(outcome: Outcome) -> str:
    return f"{outcome.name:<20} {outcome.ended:<14} {outcome.seconds:6.0f} s  {outcome.said}"


def main() -> None:
    options = read_options()
    folder = Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + options.seconds
    outcomes = []
    for outcome in outcomes_of(checks(folder, tiny=options.tiny), folder, ends_at):
        outcomes.append(outcome)
        print(line(outcome), flush=True)
        with (folder / "checks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    sys.exit(any(outcome.ended != "done" for outcome in outcomes))


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--output", required=True, help="folder for all that is found")
    reader.add_argument("--seconds", type=float, default=540, help="within which all must end")
    reader.add_argument("--tiny", action="store_true", help="tiny models on whatever device there is")
    return reader.parse_args()


if __name__ == "__main__":
    main()
