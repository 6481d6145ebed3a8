"""What OSFT costs beside SFT: seconds of a step, peak memory, and the decomposition at the start.

    python benchmarks/osft.py steps           # SFT and OSFT at ratios 0.1, 0.2, 0.3, a process each, in turn
    python benchmarks/osft.py decomposition   # full SVDs and ours, of weights of four shapes

Each run is the package's own `run` on random tokens. The lines it prints, with the machine and the versions, are what
docs/guides/osft.md quotes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

SAMPLE = 512
WARM_STEPS = 2  # left out: allocators and caches fill
RATIOS = (0.1, 0.2, 0.3)
RATIO = 0.3  # of the decompositions
SHAPES = ("1024x1024", "1024x2816", "2816x1024", "2048x5632")  # as a model stores them: outputs x inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "decomposition", "one"])
    parser.add_argument("--rounds", type=int, default=3, help="of decompositions after one that warms up, but for 1")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="of the weights to decompose")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gradients", default="step")
    parser.add_argument("--tokens", type=int, default=8192, help="per step")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="to compare with SFT")
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
    """Each variant in a process of its own, all of them in turn, several rounds; a line as each ends, then the table.

    A round's ratio is its median step over that of SFT in the same round: what else the machine does changes slowly.
    """
    found: dict[float | None, list[dict[str, Any]]] = {ratio: [] for ratio in (None, *arguments.ratios)}
    with tempfile.TemporaryDirectory() as folder:
        write_materials(Path(folder), arguments)
        for number in range(arguments.rounds):
            for ratio, runs in found.items():
                one = in_a_process(arguments, folder, ratio)
                runs.append(one)
                steps = ", ".join(f"{step:.2f}" for step in one["seconds"])
                print(f"round {number + 1}, {named(ratio)}: {steps} s, {one['memory']:.3f} GiB", flush=True)
    print("| run | step: median (range) | over SFT's: median (range) | of the processor | over SFT's | peak memory |")
    print("|---|---|---|---|---|---|")
    peak = statistics.median(one["memory"] for one in found[None])
    for ratio, runs in found.items():
        cells = [named(ratio)]
        for what in ("seconds", "processor"):
            pairs = zip(runs, found[None], strict=True)
            over = [statistics.median(mine[what]) / statistics.median(theirs[what]) for mine, theirs in pairs]
            cells += [told_spread([step for one in runs for step in one[what]]), told_spread(over)]
        mine = statistics.median(one["memory"] for one in runs)
        print(f"| {' | '.join(cells)} | {mine:.3f} GiB, {mine / peak:.3f} of SFT's |")


def named(ratio: float | None) -> str:
    return "SFT" if ratio is None else f"OSFT {ratio}"


def in_a_process(arguments: argparse.Namespace, folder: str, ratio: float | None) -> dict[str, Any]:
    passed = ("steps", "width", "layers", "dtype", "gradients", "packs", "tokens")
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
    count = (arguments.steps + WARM_STEPS) * arguments.tokens // SAMPLE
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
    """Seconds of each step after the first ones, by the clock and of all processors, and the process's peak memory in
    GiB at the end of them."""
    from training_hub.backends import Given
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
                    "global_batch_size": arguments.tokens // SAMPLE,
                    "max_seq_len": SAMPLE,
                    "max_tokens_per_gpu": arguments.tokens // arguments.packs,
                    "preflight": False,
                },
                "checkpoint": {"final": False, "minutes": None},
                "monitoring": {"console": "off"},
            }
        )
        clock = [time.process_time()]
        given = Given(watchers=[lambda report: clock.append(time.process_time())])
        history = run(recipe, given).history[WARM_STEPS:]
    processor = [after - before for before, after in itertools.pairwise(clock)][WARM_STEPS:]
    seconds = [row["step_seconds"] for row in history]
    return {"seconds": seconds, "processor": processor, "memory": history[-1]["memory_gib"]}


def compare_decompositions(arguments: argparse.Namespace) -> None:
    """Full SVDs and our split of weights as a model stores them, in turn; how far the subspaces are from those of the
    SVD in float64; and what its eigenvectors and its Gram matrix take by themselves, below which no such split can get.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| weight | way | seconds: median (range) | of the processor | over ours | V off by | U off by |")
    print("|---|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
        for line in compared(weight, arguments.rounds, device):
            print(line, flush=True)


def compared(weight: Any, rounds: int, device: str) -> Iterator[str]:
    """A row for each way to decompose `weight`."""
    import torch

    from training_hub.backends.torch_engine.adaptations.osft import decompose

    svd, kept = torch.linalg.svd, decompose.rank_kept(min(weight.shape), RATIO)
    long = weight if weight.shape[0] >= weight.shape[1] else weight.T
    gram = long.T.double() @ long.double()
    ways: dict[str, Callable[[], Any]] = {
        "SVD float64, all of U and V": lambda: svd(weight.double(), full_matrices=True),
        "SVD float64": lambda: svd(weight.double(), full_matrices=False),
        "SVD float32, as the reference": lambda: svd(weight, full_matrices=False),
        "ours": lambda: decompose.split(long, kept),
        "eigenvectors alone": lambda: decompose.eigh(gram),
        "their tridiagonal matrix alone": lambda: torch.linalg.eigvalsh(gram),
        "Gram matrix alone": lambda: decompose.lower_gram(long),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for number in range(rounds + (rounds > 1)):
        for name, work in ways.items():
            seconds, found[name] = timed(work, device)
            times[name] += [seconds] if number or rounds == 1 else []  # the first round warms up
    ours = statistics.median(processor for _, processor in times["ours"])
    exact = both_bases(found["SVD float64"], long is weight)
    for name, taken in times.items():
        walls, processors = zip(*taken, strict=True)
        apart = ["", ""]
        if name == "ours":
            one = found[name]
            u, v = exact
            left = told_apart(one.left, u[:, kept:]) if one.is_square else told_apart(one.protected, u[:, :kept])
            apart = [told_apart(one.right.T, v[:, kept:]), left]
        elif "float32" in name:
            pairs = zip(both_bases(found[name], long is weight), exact, strict=True)
            apart = [told_apart(mine[:, :kept], theirs[:, :kept]) for mine, theirs in pairs][::-1]
        yield (
            f"| {weight.shape[0]} x {weight.shape[1]} | {name} | {told_spread(walls)} | {told_spread(processors)} | "
            f"{statistics.median(processors) / ours:.2f} | {apart[0]} | {apart[1]} |"
        )


def both_bases(svd: Any, is_long: bool) -> tuple[Any, Any]:
    """Of the SVD of a weight the singular vectors of its longer side, and of its shorter, as columns."""
    u, _, v = svd
    return (u, v.T) if is_long else (v.T, u)


def told_spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def told_apart(basis: Any, exact: Any) -> str:
    """The norm of the difference of the projectors on two spaces, by their orthonormal columns."""
    import torch

    outside = basis.double() - exact @ (exact.T @ basis.double())
    return f"{float(torch.linalg.matrix_norm(outside, 2)):.0e}"


def timed(work: Callable[[], Any], device: str) -> tuple[tuple[float, float], Any]:
    """Seconds by the clock and, on a CPU, of all processors: those say more where the machine does other work too."""
    import torch

    began, busy = time.perf_counter(), time.process_time()
    done = work()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    return (elapsed, elapsed if device == "cuda" else time.process_time() - busy), done


if __name__ == "__main__":
    main()
