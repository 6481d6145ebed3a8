"""The benchmark scripts run to their end on a tiny model, and say what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *words: str, fails: bool = False) -> str:
    # The package may lie beside the benchmarks without being installed.
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    program = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done.stdout


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_one_gpu_script_trains_from_random_weights_without_network_or_data(tmp_path: Path):
    out = run("gpu.py", "--tiny", "--steps", "4", "--output", str(tmp_path / "gpu.jsonl"))
    (made,) = lines(tmp_path / "gpu.jsonl")
    assert "error" not in made
    assert made["tokens_per_second"] > 0 and 0 < made["fraction_of_peak"] < 1
    assert len(made["losses"]) == 4
    assert out.startswith("tiny-full")


@pytest.mark.slow
def test_the_adapter_workload_trains_beside_frozen_random_weights(tmp_path: Path):
    run("gpu.py", "8b-lora", "--tiny", "--steps", "4", "--output", str(tmp_path / "gpu.jsonl"))
    (made,) = lines(tmp_path / "gpu.jsonl")
    assert made["workload"] == "tiny-lora"
    assert len(made["losses"]) == 4
    assert made["planned_gib"] > 0


@pytest.mark.slow
def test_adapters_learn_the_same_here_and_in_trl(tmp_path: Path):
    for package in ("trl", "peft", "bitsandbytes"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    small = ("--size", "tiny", "--rounds", "1", "--steps", "4", "--batch", "4", "--dtype", "float32", "--threads", "1")
    run("lora.py", *small, "--output", str(tmp_path))
    made = {one["side"]: one for one in lines(tmp_path / "results.jsonl")}
    for ours, theirs in (("ours", "trl"), ("ours-4bit", "trl-4bit")):
        assert made[ours]["trained_tokens"] == made[theirs]["trained_tokens"] > 0
        # The adapters start from other random numbers, whose effect is 0 at first and small in four steps.
        assert made[ours]["losses"] == pytest.approx(made[theirs]["losses"], abs=3e-3)
    assert "ours-4bit" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.slow
def test_what_cannot_be_trained_is_a_line_too(tmp_path: Path):
    words = ("--tiny", "--set", "optimizer.beta9=1", "--output", str(tmp_path / "gpu.jsonl"))
    run("gpu.py", *words, fails=True)
    (made,) = lines(tmp_path / "gpu.jsonl")
    assert "optimizer.beta9" in made["error"]


CHECKS = [
    *("8b-full", "8b-lora", "1.7b-full", "tests", "8b-lora in 8 bits", "8b-full in 8 bits", "8b-full in full packs"),
    *("135m-full", "135m-full replayed", "8b-lora taken apart", "8b-full taken apart", "1b-full", "parts"),
]


@pytest.mark.slow
def test_all_that_waits_for_a_gpu_is_tried_in_one_command(tmp_path: Path):
    run("gpu_checks.py", "--tiny", "--output", str(tmp_path))
    assert [(one["name"], one["ended"]) for one in lines(tmp_path / "checks.jsonl")] == [(n, "done") for n in CHECKS]
    assert [one["workload"] for one in lines(tmp_path / "gpu.jsonl")] == [
        *("tiny-full", "tiny-lora", "tiny-full", "tiny-lora", "tiny-full"),
        *("tiny-full", "tiny-full", "tiny-full", "tiny-lora", "tiny-full", "tiny-full"),
    ]  # fmt: skip
    parts = {one["part"]: one for one in lines(tmp_path / "parts.jsonl")}
    assert {"sum and norm, one pass, backward", "small model, eager", "small model, recorded"} <= parts.keys()
    failed = [name for name, one in parts.items() if "error" in one]
    assert failed == [] if torch_has_gpu() else failed == ["small model, recorded"]


def torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_checks_for_which_there_is_no_time_are_named(tmp_path: Path):
    out = run("gpu_checks.py", "--tiny", "--seconds", "5", "--output", str(tmp_path), fails=True)
    assert {one["ended"] for one in lines(tmp_path / "checks.jsonl")} == {"not begun"}
    assert all(line.startswith(name) for line, name in zip(out.splitlines(), CHECKS, strict=True))


def test_a_check_that_hangs_or_fails_says_so(tmp_path: Path):
    checks, log = script("gpu_checks.py"), tmp_path / "log.txt"
    hangs = checks.begin(checks.Check("hangs", ("-c", "import time; time.sleep(3600)"), 60), tmp_path)
    assert checks.finish(hangs, 0.1, log).ended == "took too long"
    fails = checks.begin(checks.Check("fails", ("-c", "raise SystemExit('no such card')"), 60), tmp_path)
    outcome = checks.finish(fails, 60, log)
    assert (outcome.ended, outcome.said) == ("failed", "no such card")
    assert "== hangs" in log.read_text() and "no such card" in log.read_text()
    assert list(tmp_path.iterdir()) == [log]


def test_a_check_that_gets_ready_leaves_the_gpu_alone_until_its_turn(tmp_path: Path):
    checks, log = script("gpu_checks.py"), tmp_path / "log.txt"
    waits = (
        "import sys, time, pathlib; turn = pathlib.Path(sys.argv[sys.argv.index('--after') + 1])\n"
        "while not turn.exists(): time.sleep(0.01)\nprint('our turn')"
    )
    begun = checks.begin(checks.Check("waits", ("-c", waits), 60, waits=True), tmp_path)
    assert begun.process.poll() is None
    assert checks.finish(begun, 60, log) == checks.Outcome("waits", "done", pytest.approx(0, abs=60), "our turn")


def test_a_check_is_ended_with_all_that_it_started(tmp_path: Path):
    ready = tmp_path / "ready"
    child = (
        f"import os, time; open({str(ready)!r} + '.new', 'w').write(str(os.getpid())); "
        f"os.replace({str(ready)!r} + '.new', {str(ready)!r}); time.sleep(3600)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    while not ready.exists():
        time.sleep(0.01)
    script("gpu_checks.py").end(process)
    while is_running(int(ready.read_text())):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for one that has ended, though nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def script(name: str) -> Any:
    """One of the scripts as a module."""
    found = spec_from_file_location(name.removesuffix(".py"), BENCHMARKS / name)
    assert found is not None and found.loader is not None
    module = module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses look for it
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("other", ["trl", "transformers"])
def test_both_sides_learn_the_same_from_the_same_rows(other: str, tmp_path: Path):
    needed = {"trl": "trl", "transformers": "accelerate"}[other]
    if find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    run(
        *("compare.py", "gsm8k-28m", "--tiny", "--sides", "ours", other),
        *("--rounds", "1", "--steps", "4", "--threads", "1", "--output", str(tmp_path)),
    )
    ours, theirs = lines(tmp_path / "results.jsonl")
    assert ours["trained_tokens"] == theirs["trained_tokens"] > 0
    # float32, the same rows in the same order: sums in another order, and logs of four to five digits.
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-4)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| ours |" in page and f"| {other} |" in page and "of peak" in page


@pytest.mark.slow
def test_methods_are_compared_at_the_same_new_task_score(tmp_path: Path):
    words = ("--tasks", "2", "--steps", "3", "--seeds", "0", "--rates", "1e-3", "3e-3", "--methods", "full", "osft")
    out = run("continual.py", "demo", "--output", str(tmp_path), *words)
    page = (tmp_path / "matched.md").read_text()
    assert "backward transfer" in page and page.strip() in out
    found = json.loads((tmp_path / "matched" / "continual.json").read_text())
    assert [one["method"] for one in found["courses"]] == ["full", "osft"]
    assert all(len(one["watch"]) == 3 for one in found["courses"])
    # What a rate gave is known by now, and full SFT alone gets near its own best.
    best = float(page.rpartition("- full: ")[2].splitlines()[0].rpartition(": ")[2].partition(" ")[0])
    run("continual.py", "demo", "--output", str(tmp_path), *words, "--goal", f"{best - 0.01}")
    (above,) = tmp_path.glob("matched-*.md")
    assert "| full |" in above.read_text() and "osft does not reach the goal" in above.read_text()


@pytest.mark.slow
def test_three_ways_to_generate_make_the_same_answers():
    out = run("generation.py", "--tiny", "--rounds", "1")
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| float32 |")]
    assert [row[2].strip().split()[0] for row in rows] == ["ours", "batches", "one"]
    assert all(row[6].strip() == "6 of 6" for row in rows)


@pytest.mark.slow
def test_every_form_of_distillation_has_its_line(tmp_path: Path):
    out = run("distillation.py", "--tiny", "--rounds", "1", "--output", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert page.strip() in out
    losses = {row.split(" | ")[1]: float(row.rstrip(" |").split(" | ")[-1]) for row in page.splitlines()[-4:]}
    assert list(losses) == ["naive", "online", "kept", "sampled"]
    assert losses["naive"] == pytest.approx(losses["online"], abs=2e-5)


@pytest.mark.slow
def test_two_processes_and_one_are_timed_on_the_same_run(tmp_path: Path):
    words = ("--rounds", "1", "--steps", "3", "--batch", "4", "--size", "tiny", "--dtypes", "float32")
    out = run("distributed.py", *words, "--output", str(tmp_path))
    page = (tmp_path / "DISTRIBUTED.md").read_text()
    assert page.strip() in out
    made = {one["side"]: one for one in lines(tmp_path / "distributed.jsonl")}
    assert list(made) == ["one process", "replicas", "slices (FSDP2)", "heads (TP)", "tokens (CP)"]
    for side, one in made.items():
        assert f"| {side} | " in page and one["versions"]["torch"]
        # float32 sums in another order.
        assert one["losses"] == pytest.approx(made["one process"]["losses"], abs=1e-5)


@pytest.mark.slow
def test_saves_are_timed_in_each_mode(tmp_path: Path):
    words = ("--rounds", "1", "--steps", "7", "--batch", "4", "--size", "tiny")
    run("saving.py", *words, "--output", str(tmp_path / "page.md"))
    page = (tmp_path / "page.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:] == [
        "disabled",
        "async",
        "async_with_pinned_mem",
    ]


@pytest.mark.slow
def test_both_engines_train_the_same_in_the_comparison_of_engines(tmp_path: Path):
    if find_spec("jax") is None:
        pytest.skip("jax is not installed")
    small = ("--size", "tiny", "--rounds", "1", "--steps", "4", "--batch", "4", "--dtype", "float32", "--threads", "1")
    # EasyDeL lives in an environment of its own, and is compared where there is one.
    rival = os.environ.get("TRAINING_HUB_EASYDEL")
    out = run("second_engine.py", *small, *(["--easydel", rival] if rival else []), "--output", str(tmp_path))
    made = {one["engine"]: one for one in lines(tmp_path / "results.jsonl")}
    assert list(made) == ["torch", "jax", *(["easydel"] if rival else [])]
    assert len({(one["tokens"], one["trained_tokens"]) for one in made.values()}) == 1
    assert made["jax"]["losses"] == pytest.approx(made["torch"]["losses"], abs=1e-4)
    if rival:  # whose weights are float16 as they are read
        assert made["jax"]["losses"] == pytest.approx(made["easydel"]["losses"], abs=5e-3)
    assert "| jax | float32 |" in out
    assert "jax is faster by" in (tmp_path / "RESULTS.md").read_text()


def test_every_file_with_a_test_for_a_gpu_is_among_those_that_are_run_there():
    wanted = {
        str(file.relative_to(BENCHMARKS.parent))
        for file in (BENCHMARKS.parent / "tests").rglob("test_*.py")
        if "mark.gpu" in (text := file.read_text()) or "ON_GPU" in text
    }
    assert set(script("gpu_checks.py").TESTS) == wanted - {"tests/test_benchmarks.py"}
