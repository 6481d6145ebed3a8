"""Planned memory against measured: `python benchmarks/memory.py` prints a table and appends to memory.jsonl.

Each configuration trains two steps in a fresh process; the measured peak is Linux's VmHWM of that process, the most
it ever held in memory: libraries, mapped files and what the allocator lost between blocks included. The plan is the
run's own plan.json, made from shapes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GIB = 2**30
STEPS = 2  # the second has the optimizer's state beside its gradients
BETWEEN_LOOKS = 0.005


@dataclass(frozen=True)
class Configuration:
    """A model and what it trains on: `lengths` are repeated until a step has `tokens`."""

    config: dict[str, int]
    dtype: str
    optimizer: str
    lengths: tuple[int, ...]
    tokens: int
    packs: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)


NARROW = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
MIDDLE = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8}
CONFIGURATIONS = {
    "short documents, float32 AdamW": Configuration(
        {**NARROW, "intermediate_size": 704, "vocab_size": 8192}, "float32", "AdamW", (96, 160, 160, 240, 400), 16384
    ),
    "long documents, bfloat16 AdamW": Configuration(
        {**SMALL, "intermediate_size": 1408, "vocab_size": 8192}, "bfloat16", "AdamW", (2048,), 4096
    ),
    "vocabulary 131,072, bfloat16 AdamW": Configuration(
        {**NARROW, "intermediate_size": 704, "vocab_size": 131072}, "bfloat16", "AdamW", (512,), 8192
    ),
    "vocabulary 131,072, float32 Adafactor": Configuration(
        {**NARROW, "intermediate_size": 704, "vocab_size": 131072}, "float32", "Adafactor", (300, 700), 4096
    ),
    "158 M weights, bfloat16 SGD, two packs": Configuration(
        {**MIDDLE, "intermediate_size": 2816, "vocab_size": 8192}, "bfloat16", "SGD", (100, 400), 512, 2
    ),
    "158 M weights, float32 AdamW": Configuration(
        {**MIDDLE, "intermediate_size": 2816, "vocab_size": 8192}, "float32", "AdamW", (512,), 512
    ),
    "158 M weights, bfloat16 AdamW in 8 bits": Configuration(
        {**MIDDLE, "intermediate_size": 2816, "vocab_size": 8192}, "bfloat16", "AdamW", (512,), 512,
        overrides={"optimizer.state": "8bit"},
    ),
    "long documents, selective checkpointing": Configuration(
        {**SMALL, "intermediate_size": 1408, "vocab_size": 8192}, "bfloat16", "AdamW", (2048,), 8192,
        overrides={"training.activation_checkpointing": "selective"},
    ),
    "long documents, full checkpointing": Configuration(
        {**SMALL, "intermediate_size": 1408, "vocab_size": 8192}, "bfloat16", "AdamW", (2048,), 8192,
        overrides={"training.activation_checkpointing": "full"},
    ),
}  # fmt: skip


def main() -> None:
    options = read_options()
    if options.one:
        print(json.dumps(measure(CONFIGURATIONS[options.one], Path(options.folder))))
        return
    found = {}
    with tempfile.TemporaryDirectory(prefix="training-hub-memory-") as folder:
        for number, name in enumerate(options.configurations or CONFIGURATIONS):
            found[name] = in_a_process(name, Path(folder) / str(number), options.threads)
            keep(name, found[name], options)
            print(row(name, found[name]), file=sys.stderr, flush=True)
    lines = ["| configuration | planned GiB | measured GiB | planned / measured |", "|---|---|---|---|"]
    print("\n".join([*lines, *(row(name, one) for name, one in found.items())]))


def in_a_process(name: str, folder: Path, threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__)), "--one", name, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """Train, in this process, and compare."""
    make_materials(configuration, folder)
    import training_hub.backends.torch_engine.engine  # noqa: F401  # what a run imports, before anything is loaded
    from training_hub import sft

    looks = Looks()
    result = sft(
        str(folder / "model"),
        str(folder / "rows.jsonl"),
        str(folder / "out"),
        backend="torch",
        max_steps=STEPS,
        effective_batch_size=count_rows(configuration),
        max_seq_len=max(configuration.lengths),
        overrides={
            "model.dtype": configuration.dtype,
            "optimizer.name": configuration.optimizer,
            "training.max_tokens_per_gpu": configuration.tokens,
            "training.preflight": False,
            "data.cache": False,
            "data.format": "tokens",
            "monitoring.console": "off",
            "checkpoint.final": False,
            "checkpoint.minutes": None,
            **configuration.overrides,
        },
    )
    looks.stop()
    return {
        "planned": result.plan["memory_gib"],
        "measured_gib": status()["VmHWM"],
        "libraries_gib": looks.first["VmRSS"],
        "anonymous_gib": looks.most["RssAnon"],
        "mapped_gib": looks.most["RssFile"],
        "packs_per_step": result.plan["run"]["packs_per_step"],
    }


class Looks:
    """Looks at the process's memory every few milliseconds; the most of each kind."""

    def __init__(self) -> None:
        self.first = self.most = status()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(BETWEEN_LOOKS):
            self.most = {name: max(value, self.most[name]) for name, value in status().items()}

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def status() -> dict[str, float]:
    """GiB by name, of this process, from proc(5)."""
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {words[0][:-1]: int(words[1]) / 2**20 for words in lines if words and words[0][:-1] in wanted}


def count_rows(configuration: Configuration) -> int:
    each, rows, total = configuration.lengths, 0, 0
    while total + each[rows % len(each)] <= configuration.tokens:
        total += each[rows % len(each)]
        rows += 1
    return rows * configuration.packs


def make_materials(configuration: Configuration, folder: Path) -> None:
    """A model with random weights and rows of random tokens, half of them trained, made by a process that then ends."""
    folder.mkdir(parents=True, exist_ok=True)
    code = "import sys, json, memory; memory.write_model(json.loads(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    arguments = [json.dumps(configuration.config), str(folder / "model")]
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    lengths = [configuration.lengths[i % len(configuration.lengths)] for i in range(count_rows(configuration))]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            ids = [(number * 7919 + place * 104729) % 256 for place in range(length)]
            labels = [-100] * (length // 2) + ids[length // 2 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def write_model(config: dict[str, int], folder: str) -> None:
    from materials import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**config, max_position_embeddings=8192, tie_word_embeddings=True)).save_pretrained(
        folder
    )
    byte_tokenizer(iter(["a few words"])).save_pretrained(folder)


def row(name: str, found: dict[str, Any]) -> str:
    planned, measured = found["planned"]["total"], found["measured_gib"]
    return f"| {name} | {planned:.2f} | {measured:.2f} | {planned / measured:.3f} |"


def keep(name: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a line with what is needed to repeat it."""
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    facts = {"configuration": name, **asdict(CONFIGURATIONS[name]), "threads": options.threads, "versions": versions}
    with Path(options.output).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**facts, **found, "date": time.strftime("%Y-%m-%d")}) + "\n")


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("configurations", nargs="*", metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)}")
    reader.add_argument("--threads", type=int, default=2)
    reader.add_argument("--output", default=str(HERE / "memory.jsonl"), help="file to which a line each is appended")
    reader.add_argument("--one", help=argparse.SUPPRESS)
    reader.add_argument("--folder", help=argparse.SUPPRESS)
    return reader.parse_args()


if __name__ == "__main__":
    main()
