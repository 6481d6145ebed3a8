"""Planned memory against measured: `python benchmarks/memory.py` measures all cases and writes MEMORY.md.

Each configuration trains two steps in processes of its own, forks of one that has imported the libraries. The measured
peak of a process is the most anonymous memory it ever had, in swap or not, and the most of mapped files: libraries are
in it, and what the allocator lost between blocks. Of several processes the one with the most counts. The plan is the
run's own plan.json, made from shapes alone. Each measurement is a line of memory.jsonl with versions and machine;
MEMORY.md is written from the newest of each configuration.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memory_cases import ALONE, CONFIGURATIONS, DIVIDED, Configuration

HERE = Path(__file__).parent
GIB = 2**30
STEPS = 2  # the second has the optimizer's state beside its gradients
BETWEEN_LOOKS = 0.002
KINDS = ("RssAnon", "VmSwap", "RssFile")
COLUMNS = "| configuration | planned GiB | in blocks | ratio | planned in all | resident | ratio |"
HEAD = """# Planned memory against measured

```
python benchmarks/memory.py
```

Two steps of each configuration in processes of one thread each, on a CPU, by gloo where there are several; half of the
tokens are trained. The plan is the run's own, made from shapes before weights are read. Of several processes the one
that had most is shown. The models are in `memory_cases.py`.

- **In blocks** is the most that the allocator had handed out at once, beyond what was there before the run: tensors,
  what libraries keep for products of the sizes they met, and Python's own. Planned for it is `memory_gib.total` without
  `libraries` and `gaps`.
- **Resident** is the most anonymous memory, in swap or not, with mapped files, and planned for it is `total`. Beside
  blocks that is libraries and holes between blocks, which glibc before 2.38 does not fill with aligned blocks of the
  size that left them: so they grow with blocks that come and go in each layer, and differ from run to run.
- Weights trained in the format of their files (float32 of a float32 folder) may lie where the file was mapped, which is
  no block but resident: 0.59 GiB of 158 million.
"""


def main() -> None:
    options = read_options()
    if not options.write:
        measure_all(options.configurations or list(CONFIGURATIONS), options.output)
    (options.output / "MEMORY.md").write_text(page(options.output), encoding="utf-8")


def measure_all(names: Sequence[str], output: Path) -> None:
    """Measure one configuration after the other, each in forks of this process."""
    import torch._dynamo  # noqa: F401  # which torch loads when weights are first divided
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import training_hub.backends.torch_engine.engine  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="training-hub-memory-") as folder:
        for number, name in enumerate(names):
            found = in_processes(CONFIGURATIONS[name], Path(folder) / str(number))
            keep(name, found, output)
            print(row(name, found), file=sys.stderr, flush=True)


def in_processes(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """What the process with the highest peak found, and the peaks of all. Raises SystemExit where one fails."""
    in_a_fork(lambda: make_materials(configuration, folder))()
    port = free_port()
    members = [
        in_a_fork(partial(measure, configuration, folder, rank, port)) for rank in range(configuration.processes)
    ]
    answers = [member() for member in members]
    fullest = max(answers, key=lambda one: one["measured_gib"])
    return {**fullest, "measured_gib_of_each": [one["measured_gib"] for one in answers]}


def in_a_fork(work: Callable[[], Any]) -> Callable[[], Any]:
    """What waits for the answer of `work`, which is done by a fork of this process that then ends."""
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(reading)
        status = 1
        try:
            answer = json.dumps(work())
            with os.fdopen(writing, "w") as file:
                file.write(answer)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # taking torch apart takes seconds
    os.close(writing)

    def answer() -> Any:
        with os.fdopen(reading) as file:
            said = file.read()
        if os.waitpid(number, 0)[1]:
            raise SystemExit("a process failed")
        return json.loads(said)

    return answer


def measure(configuration: Configuration, folder: Path, rank: int, port: int) -> dict[str, Any]:
    """Train, in this process, as torchrun would have started it, and compare."""
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    count = configuration.processes
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    asked = Recipe.model_validate(sections(configuration, folder))
    if asked.algorithm == "lora_sft":
        import peft  # noqa: F401
    if asked.model.quantization == "int4":
        import bitsandbytes  # noqa: F401
    looks = Looks()
    result = run(asked)
    looks.stop()
    return {
        "planned": result.plan["memory_gib"],
        "measured_gib": looks.most["resident"],
        "blocks_gib": looks.most["blocks"] - looks.first["blocks"],
        "libraries_gib": looks.first["resident"],
        "mapped_gib": looks.most["mapped"],
        "packs_per_step": result.plan["run"]["packs_per_step"],
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sections(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """The recipe of a configuration whose materials lie in this folder."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "dtype": configuration.dtype},
        "data": {"path": str(folder / "rows.jsonl"), "cache": False, "format": "tokens"},
        "training": {
            "steps": STEPS,
            "global_batch_size": count_rows(configuration),
            "max_seq_len": max(configuration.lengths),
            "max_tokens_per_gpu": configuration.tokens,
            "preflight": False,
        },
        "optimizer": {"name": configuration.optimizer},
        "monitoring": {"console": "off"},
        "checkpoint": {"final": False, "minutes": None},
        "parallelism": configuration.parallelism,
    }
    merged: dict[str, Any] = {**base, "output": str(folder / "out")}
    for name, values in configuration.sections.items():
        merged[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return merged


class Looks:
    """Looks at the process's memory every few milliseconds; the most of each kind, in GiB."""

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


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2(3) tells of all heaps; uordblks and hblkhd are bytes that are handed out."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def status() -> dict[str, float]:
    """GiB of this process: resident anonymous memory with what is in swap, and mapped files, together and the latter
    alone (proc(5)); and blocks that the allocator has handed out."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    found = {words[0][:-1]: int(words[1]) / 2**20 for words in lines if words and words[0][:-1] in KINDS}
    heap = ctypes.CDLL(None).mallinfo2
    heap.restype = Mallinfo
    blocks = heap()
    return {
        "resident": sum(found.values()),
        "mapped": found["RssFile"],
        "blocks": (blocks.uordblks + blocks.hblkhd) / GIB,
    }


def count_rows(configuration: Configuration) -> int:
    """Samples of a step: as many as fill the packs of all processes that have samples of their own."""
    each, rows, total = configuration.lengths, 0, 0
    while total + each[rows % len(each)] <= configuration.tokens:
        total += each[rows % len(each)]
        rows += 1
    return rows * configuration.packs * with_own_samples(configuration)


def with_own_samples(configuration: Configuration) -> int:
    """How many processes have samples of their own."""
    names = ("tensor_parallel_degree", "context_parallel_degree", "pipeline_parallel_degree")
    return configuration.processes // math.prod(configuration.parallelism.get(name, 1) for name in names)


def make_materials(configuration: Configuration, folder: Path) -> None:
    """A model with random weights and rows of random tokens, half of them trained."""
    folder.mkdir(parents=True)
    write_model(configuration.config, folder / "model")
    lengths = [configuration.lengths[i % len(configuration.lengths)] for i in range(count_rows(configuration))]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            ids = [(number * 7919 + place * 104729) % 256 for place in range(length)]
            labels = [-100] * (length // 2) + ids[length // 2 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def write_model(config: dict[str, Any], folder: Path) -> None:
    import transformers
    from materials import byte_tokenizer

    kind = "Qwen3Moe" if "num_experts" in config else "Llama"
    options = {**config, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    model.save_pretrained(folder)
    byte_tokenizer(iter(["a few words"])).save_pretrained(folder)


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table: all that is resident, and of it what comes with the run, but for holes between blocks."""
    planned, measured = found["planned"]["total"], found["measured_gib"]
    tensors, blocks = planned - found["planned"]["libraries"] - found["planned"]["gaps"], found["blocks_gib"]
    return (
        f"| {name} | {tensors:.2f} | {blocks:.2f} | {tensors / blocks:.3f} | {planned:.2f} | {measured:.2f} | "
        f"{planned / measured:.3f} |"
    )


def page(folder: Path) -> str:
    """MEMORY.md from the newest line of each configuration."""
    lines = map(json.loads, (folder / "memory.jsonl").read_text(encoding="utf-8").splitlines())
    newest = {one["configuration"]: one for one in lines}
    parts = [HEAD]
    for title, names in (("One process", ALONE), ("Several processes", DIVIDED)):
        rows = [row(name, newest[name]) for name in names if name in newest]
        parts += [f"\n## {title}\n\n{COLUMNS}\n|---|---|---|---|---|---|---|", *rows] if rows else []
    missing = [name for name in CONFIGURATIONS if name not in newest]
    parts += [f"\nNot measured here: {'; '.join(missing)}."] if missing else []
    last = list(newest.values())[-1]
    told = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    return "\n".join([*parts, f"\n{last['machine']}; {told}; {last['date']}.\n"])


def keep(name: str, found: dict[str, Any], folder: Path) -> None:
    """Append a line with what is needed to repeat it."""
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    facts = {"configuration": name, **asdict(CONFIGURATIONS[name]), "versions": versions}
    about = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
    }
    with (folder / "memory.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**facts, **found, **about}) + "\n")


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("configurations", nargs="*", metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)}")
    reader.add_argument("--output", type=Path, default=HERE, help="folder of memory.jsonl and MEMORY.md")
    reader.add_argument("--write", action="store_true", help="write MEMORY.md anew from what has been measured")
    return reader.parse_args()


if __name__ == "__main__":
    main()
