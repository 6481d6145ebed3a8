"""What a step of distillation costs: processor time and memory, against the naive form with two full logit tensors.

    python benchmarks/distillation.py            # writes benchmarks/DISTILLATION.md, about four minutes of one core
    python benchmarks/distillation.py --tiny     # tries the script in seconds, and measures nothing

Every form trains the same student on the same tokens, forward and backward, in a process of its own; the forms take
turns. naive: transformers' logits of both models at all positions, log_softmax in float32, torch's kl_div, of which the
trained positions count. online, kept, sampled: the package's objective with the teacher beside, with its 64 likeliest
tokens, with 50 drawn ones. Decoders are the same in all forms, and small, so that what differs is the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

FORMS = ("naive", "online", "kept", "sampled")
VOCABULARIES = (32_000, 131_072)
PAGE = Path(__file__).with_name("DISTILLATION.md")


@dataclass(frozen=True)
class Sizes:
    """Tokens of a step, of which every second is trained; widths of both models, and steps that are measured."""

    tokens: int = 512
    student: int = 256
    teacher: int = 512
    layers: int = 2
    steps: int = 2


TINY = Sizes(tokens=32, student=32, teacher=48, layers=1, steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--form", choices=FORMS, help="measure this form alone and print it as JSON")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARIES[0])
    parser.add_argument("--kept", type=Path, help="where targets are kept over the rounds; with --form")
    arguments = parser.parse_args()
    if arguments.form:
        sizes = TINY if arguments.tiny else Sizes()
        print(json.dumps(measure(arguments.form, arguments.vocabulary, arguments.dtype, sizes, arguments.kept)))
        return
    page = compare(arguments)
    arguments.output.write_text(page, encoding="utf-8")
    print(page)


def compare(arguments: argparse.Namespace) -> str:
    """The page: each form in a process of its own, all of them in turn, several rounds."""
    vocabularies = (500,) if arguments.tiny else arguments.vocabularies
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as kept:
        for number in range(arguments.rounds):
            for vocabulary in vocabularies:
                for form in FORMS:
                    words = ["--form", form, "--vocabulary", str(vocabulary), "--dtype", arguments.dtype]
                    command = [
                        sys.executable,
                        __file__,
                        *words,
                        "--kept",
                        kept,
                        *(["--tiny"] if arguments.tiny else []),
                    ]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    one = json.loads(done.stdout.splitlines()[-1])
                    found.setdefault((vocabulary, form), []).append(one)
                    print(f"round {number + 1}: {vocabulary:,}: {form}: {one['seconds']:.2f} s", file=sys.stderr)
    return "\n".join([*head(arguments), *(row(found, *key) for key in found)]) + "\n"


def head(arguments: argparse.Namespace) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    sizes = TINY if arguments.tiny else Sizes()
    return [
        "# A step of distillation",
        "",
        "<!-- Written by benchmarks/distillation.py. -->",
        "",
        f"{platform.machine()} {processor()}, one thread, Python {platform.python_version()}, {packages}.",
        f"{sizes.tokens} tokens, half of them trained; student of width {sizes.student}, teacher of {sizes.teacher}, "
        f"{arguments.dtype}; {arguments.rounds} rounds of {sizes.steps} steps, medians.",
        f"At the end {os.getloadavg()[2]:.1f} processes wanted one of {os.cpu_count()} cores, as a mean of 15 minutes.",
        "",
        "| vocabulary | form | processor time of a step | lowest to highest | of naive | memory beside the models |"
        " of naive | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]


def row(found: dict[tuple[int, str], list[dict[str, Any]]], vocabulary: int, form: str) -> str:
    def median(name: str, of: str) -> float:
        return statistics.median(one[name] for one in found[vocabulary, of])

    each = [one["seconds"] for one in found[vocabulary, form]]
    seconds, memory = median("seconds", form), median("mebibytes", form)
    return (
        f"| {vocabulary:,} | {form} | {seconds:.2f} s | {min(each):.2f} to {max(each):.2f} s "
        f"| {seconds / median('seconds', 'naive'):.2f} | {memory:,.0f} MiB "
        f"| {memory / median('mebibytes', 'naive'):.2f} | {median('loss', form):.5f} |"
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def measure(form: str, vocabulary: int, dtype: str, sizes: Sizes, kept: Path) -> dict[str, Any]:
    """Processor seconds of a step, the peak of memory above what the models take, and the loss of the first step."""
    import torch

    torch.set_num_threads(1)
    student = model_of(vocabulary, sizes.student, sizes.layers, dtype)
    step = STEPS[form](student, vocabulary, dtype, sizes, kept)
    before = peak_mebibytes()
    loss = step()
    began = time.process_time()
    for _ in range(sizes.steps):
        student.zero_grad()
        step()
    seconds = (time.process_time() - began) / sizes.steps
    return {"seconds": seconds, "mebibytes": peak_mebibytes() - before, "loss": loss}


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def model_of(vocabulary: int, width: int, layers: int, dtype: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, initializer_range=0.05,
    )  # fmt: skip
    with torch.device("cpu"):
        return LlamaForCausalLM(config).to(getattr(torch, dtype))


def pack_of(vocabulary: int, sizes: Sizes) -> Any:
    import numpy as np

    from training_hub.types import Pack

    weights = np.zeros(sizes.tokens, np.float32)
    weights[1::2] = 1
    return Pack(
        ids=np.random.default_rng(0).integers(0, vocabulary, sizes.tokens).astype(np.int32),
        positions=np.arange(sizes.tokens, dtype=np.int32),
        weights=weights,
        boundaries=np.array([0, sizes.tokens], np.int32),
        samples=np.array([0]),
    )


def naive(student: Any, vocabulary: int, dtype: str, sizes: Sizes, kept: Path) -> Callable[[], float]:
    import torch

    teacher = model_of(vocabulary, sizes.teacher, sizes.layers, dtype).eval()
    pack = pack_of(vocabulary, sizes)
    ids, weights = torch.from_numpy(pack.ids).long()[None], torch.from_numpy(pack.weights)[1:]

    def step() -> float:
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
        log_q = torch.log_softmax(student(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
        losses = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        mean = (losses * weights).sum() / weights.sum()
        mean.backward()
        return float(mean.detach())

    return step


def with_teaching(student: Any, teaching: Any, vocabulary: int, sizes: Sizes) -> Callable[[], float]:
    from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
    from training_hub.backends.torch_engine.objectives.distillation import Distillation
    from training_hub.backends.torch_engine.objectives.divergence import Divergence
    from training_hub.backends.torch_engine.objectives.token_loss import PLAIN
    from training_hub.backends.torch_engine.tensors import to_device

    objective, pack = Distillation(CrossEntropy(), Divergence(), PLAIN, teaching), pack_of(vocabulary, sizes)

    def step() -> float:
        mean = objective(student, to_device(pack, "cpu")).total / float(pack.weights.sum())
        mean.backward()
        return float(mean.detach())

    return step


def online(student: Any, vocabulary: int, dtype: str, sizes: Sizes, kept: Path) -> Callable[[], float]:
    from training_hub.backends.torch_engine.teacher.online import Online

    teacher = model_of(vocabulary, sizes.teacher, sizes.layers, dtype).requires_grad_(False).eval()
    return with_teaching(student, Online(teacher, vocabulary, True, True), vocabulary, sizes)


def from_kept(kind: str, width: int) -> Callable[..., Callable[[], float]]:
    """The teacher's word is made in another process, once, as in a run that finds it on disk."""

    def made(student: Any, vocabulary: int, dtype: str, sizes: Sizes, kept: Path) -> Callable[[], float]:
        from training_hub.backends.torch_engine.teacher.form import Form
        from training_hub.backends.torch_engine.teacher.kept import Kept
        from training_hub.data.targets import TargetStore

        folder = kept / f"{kind}-{vocabulary}"
        if not folder.exists():
            folder.mkdir()
            asked = {"folder": str(folder), "kind": kind, "width": width, "vocabulary": vocabulary, "dtype": dtype}
            script = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
            script += f"from distillation import Sizes, ask; ask(sizes={sizes!r}, **{asked!r})"
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        store = Kept(TargetStore(folder, [0, 1], width), Form(kind, width, vocabulary, 1.0, 0))
        return with_teaching(student, store, vocabulary, sizes)

    return made


def ask(folder: str, kind: str, width: int, vocabulary: int, dtype: str, sizes: Sizes) -> None:
    """Write the targets of the one pack into `folder`."""
    import numpy as np
    import torch

    from training_hub.backends.torch_engine.teacher.form import Form
    from training_hub.backends.torch_engine.teacher.online import Online
    from training_hub.backends.torch_engine.tensors import to_device
    from training_hub.data.targets import Rows, write_part

    teacher = model_of(vocabulary, sizes.teacher, sizes.layers, dtype).requires_grad_(False).eval()
    tensors = to_device(pack_of(vocabulary, sizes), "cpu")
    whole = Online(teacher, vocabulary, True, True).targets(tensors)
    form = Form(kind, width, vocabulary, 1.0, 0)
    ids, logs, last = form.kept(whole, len(tensors.rows), torch.Generator().manual_seed(0))
    rows = Rows(ids.numpy(), None if logs is None else logs.numpy(), last.numpy())
    write_part(Path(folder), 0, rows, np.array([len(tensors.rows)]))


STEPS = {"naive": naive, "online": online, "kept": from_kept("top_k", 64), "sampled": from_kept("sampled", 50)}


if __name__ == "__main__":
    main()
