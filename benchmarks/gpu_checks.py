"""All that waits for a GPU, in one command: `python benchmarks/gpu_checks.py --output FOLDER`.

Tests first, since a number of code that is wrong is worth nothing; then the workloads that have never been measured,
those with a target first; then what tells where time goes. Each check is a process of its own with a limit of its own:
one that hangs or fails costs no other its turn. All together end within --seconds (540 by default), and what there was
no time for is named. Everything that checks print, and the lines of gpu.py and gpu_parts.py, are in FOLDER, written as
they come: what a machine that is taken away had done is kept.

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
from contextlib import suppress
from dataclasses import asdict, dataclass
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
    """A command, as words after `python`, and the seconds it may take."""

    name: str
    words: tuple[str, ...]
    seconds: int


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
    size = ("--tiny", "--steps", "4") if tiny else ("--steps", "8")

    def trained(workload: str, *words: str) -> tuple[str, ...]:
        return ("benchmarks/gpu.py", workload, *size, *lines, *words)

    eight_bit = () if tiny else ("--set", "training.fp8=true")  # refused where there is no GPU that can
    return [
        Check("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS), 150),
        Check("1.7b-full", trained("1.7b-full"), 90),
        Check("8b-full", trained("8b-full"), 120),
        Check("8b-lora", trained("8b-lora"), 100),
        Check("8b-full in 8 bits", trained("8b-full", *eight_bit), 120),
        Check(
            "parts",
            ("benchmarks/gpu_parts.py", "--output", str(folder / "parts.jsonl"), *(("--tiny",) if tiny else ())),
            90,
        ),
        Check("1b-full taken apart", trained("1b-full", "--profile", "--steps", "10"), 75),
    ]


def run(check: Check, seconds: float, log: Path) -> Outcome:
    """Run the check for at most so long; what it prints goes to `log`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a plug-in that warns would fail tests that take warnings for errors
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n== {check.name}: python {' '.join(check.words)}\n".encode())
        file.flush()
        begins = file.tell()
        process = subprocess.Popen(
            [sys.executable, *check.words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended = "failed" if process.wait(timeout=seconds) else "done"
        except subprocess.TimeoutExpired:
            ended = "took too long"
        finally:
            end(process)
    printed = log.read_bytes()[begins:].decode(errors="replace").strip().splitlines()
    return Outcome(check.name, ended, time.monotonic() - began, printed[-1].strip() if printed else "")


def end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of it, so that the next check has the GPU to itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def line(outcome: Outcome) -> str:
    return f"{outcome.name:<20} {outcome.ended:<14} {outcome.seconds:6.0f} s  {outcome.said}"


def main() -> None:
    options = read_options()
    folder = Path(options.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + options.seconds
    outcomes = []
    for check in checks(folder, tiny=options.tiny):
        left = ends_at - time.monotonic()
        if left < LEAST_SECONDS:
            outcome = Outcome(check.name, "not begun", 0.0, "")
        else:
            outcome = run(check, min(left, check.seconds), folder / "log.txt")
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
