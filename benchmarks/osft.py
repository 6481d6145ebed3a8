"""What OSFT costs beside SFT: seconds of a step, peak memory, and the decomposition at the start.

    python benchmarks/osft.py steps           # SFT and OSFT at ratios 0.1, 0.2, 0.3, a process each, in turn
    python benchmarks/osft.py decomposition   # full SVDs and ours on matrices of 1024 x 2816 and 2048 x 5632

Each run is the package's own `run` on random tokens. The lines it prints, with the machine and the versions, are what
docs/guides/osft.md quotes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 8192
SAMPLE = 512
WARM_STEPS = 2  # left out: allocators and caches fill
RATIOS = (0.1, 0.2, 0.3)
SHAPES = ((1024, 2816), (2048, 5632))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "decomposition", "one"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gradients", default="step")
    parser.add_argument("--packs", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--ratio", type=float, default=None, help="of the one run; none: SFT")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.what == "one":
        print(json.dumps(one_run(arguments)))
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{platform.machine()} {processor()}, Python {platform.python_version()}, {packages}")
    {"steps": compare_steps, "decomposition": compare_decompositions}[arguments.what](arguments)


def processor() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name}, {torch.get_num_threads()} threads"


def compare_steps(arguments: argparse.Namespace) -> None:
    """Each variant in a process of its own, all of them in turn, several rounds; medians of all steps but the first."""
    seconds: dict[float | None, list[float]] = {ratio: [] for ratio in (None, *RATIOS)}
    memory: dict[float | None, list[float]] = {ratio: [] for ratio in seconds}
    with tempfile.TemporaryDirectory() as folder:
        write_materials(Path(folder), arguments)
        for _ in range(arguments.rounds):
            for ratio in seconds:
                found = in_a_process(arguments, folder, ratio)
                seconds[ratio] += found["seconds"]
                memory[ratio].append(found["memory"])
    base_seconds, base_memory = statistics.median(seconds[None]), statistics.median(memory[None])
    for ratio in seconds:
        median, peak = statistics.median(seconds[ratio]), statistics.median(memory[ratio])
        spread = f"{min(seconds[ratio]):.2f} to {max(seconds[ratio]):.2f}"
        fastest = min(seconds[ratio]) / min(seconds[None])
        print(
            f"{'SFT' if ratio is None else f'OSFT {ratio}':<10} step {median:7.3f} s ({spread})  "
            f"x {median / base_seconds:.3f}, of the fastest x {fastest:.3f}   "
            f"peak {peak:7.3f} GiB  x {peak / base_memory:.3f}"
        )


def in_a_process(arguments: argparse.Namespace, folder: str, ratio: float | None) -> dict[str, Any]:
    passed = ("steps", "width", "layers", "dtype", "gradients", "packs")
    words = [word for name in passed for word in (f"--{name}", str(getattr(arguments, name)))]
    words += ["--folder", folder, *(["--ratio", str(ratio)] if ratio is not None else [])]
    done = subprocess.run([sys.executable, __file__, "one", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_materials(folder: Path, arguments: argparse.Namespace) -> None:
    """A random Llama, and rows of random tokens for all steps."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        max_position_embeddings=SAMPLE,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    random = np.random.default_rng(0)
    count = (arguments.steps + WARM_STEPS) * TOKENS_PER_STEP // SAMPLE
    ids = random.integers(3, 4096, (count, SAMPLE)).tolist()
    lines = [json.dumps({"input_ids": row, "labels": row}) for row in ids]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(4096)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w1").save_pretrained(folder)


def one_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step after the first ones, and the process's peak memory in GiB at the end of them."""
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    osft: dict[str, Any] = {"algorithm": "sft"}
    if arguments.ratio is not None:
        settings = {"unfreeze_rank_ratio": arguments.ratio, "gradients": arguments.gradients, "cache": False}
        osft = {"algorithm": "osft", "osft": settings}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as output:
        recipe = Recipe.model_validate(
            {
                **osft,
                "output": f"{output}/run",
                "model": {"path": str(arguments.folder / "model"), "dtype": arguments.dtype},
                "data": {"path": str(arguments.folder / "rows.jsonl"), "format": "tokens", "cache": False},
                "training": {
                    "global_batch_size": TOKENS_PER_STEP // SAMPLE,
                    "max_seq_len": SAMPLE,
                    "max_tokens_per_gpu": TOKENS_PER_STEP // arguments.packs,
                    "preflight": False,
                },
                "checkpoint": {"final": False, "minutes": None},
                "monitoring": {"console": "off"},
            }
        )
        history = run(recipe).history[WARM_STEPS:]
    return {"seconds": [row["step_seconds"] for row in history], "memory": history[-1]["memory_gib"]}


def compare_decompositions(arguments: argparse.Namespace) -> None:
    """Full SVDs and our split, in turn; and how far the low subspaces are from those of the SVD in float64."""
    import torch

    from training_hub.backends.torch_engine.adaptations.osft.decompose import rank_kept, split

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in SHAPES:
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
        kept = rank_kept(min(shape), 0.3)
        ways: dict[str, Callable[[], Any]] = {
            "SVD float32": lambda w=weight: torch.linalg.svd(w, full_matrices=False)[0].T,
            "SVD float64": lambda w=weight: torch.linalg.svd(w.double(), full_matrices=False)[0].T,
            "split": lambda w=weight, k=kept: split(w.T, k).right,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, Any] = {}
        for _ in range(arguments.rounds):
            for name, work in ways.items():
                seconds, found[name] = timed(work, device)
                times[name].append(seconds)
        ours = statistics.median(times["split"])
        exact = found["SVD float64"][kept:]
        for name, low in found.items():
            low = (low if name == "split" else low[kept:]).double()
            apart = torch.linalg.matrix_norm(low.T @ low - exact.T @ exact, 2)
            median, spread = statistics.median(times[name]), f"{min(times[name]):.2f} to {max(times[name]):.2f}"
            print(
                f"{shape[0]} x {shape[1]}  {name:<11} {median:7.3f} s ({spread})  x {median / ours:.1f}  "
                f"low projector off by {float(apart):.0e}"
            )


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    import torch

    began = time.perf_counter()
    done = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, done


if __name__ == "__main__":
    main()
