"""Ours on one GPU: `python benchmarks/gpu.py` trains each workload in a process of its own and appends to gpu.jsonl.

Needs torch with CUDA, transformers and this repository (8b-lora: peft too); no network, no data: weights are random
in the shape of a known model, rows are random tokens of full length, all of them trained. What runs out of memory is a
line too, the next workload is tried, and the command fails at its end. `--tiny` does the same with a tiny model on
whatever device there is.
8b-lora trains rank 16 in all linear layers of a frozen bfloat16 model; `--set model.quantization=...` needs a folder,
and is not for random weights.

fraction_of_peak: operations that the tokens need (6 for each weight and token, 4 where it is frozen, and causal
attention) per second, over the rate of a matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

LLAMA_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
QWEN_2B = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
SHAPES = {"135m": LLAMA_135M, "1b": LLAMA_1B, "1.7b": QWEN_2B, "8b": LLAMA_8B, "tiny": TINY}
ALGORITHMS = {"full": "sft", "lora": "lora_sft"}
WORKLOADS = ("135m-full", "1b-full", "1.7b-full", "8b-full", "8b-lora")
TARGETS = {"1b-full": 55_000, "1.7b-full": 42_000, "8b-full": 12_500, "8b-lora": 17_000}
"""Tokens per second that one H200 is meant to reach, where there is such a number."""
OWN = {"8b-full": {"optimizer.state": "8bit"}}
"""Settings without which a workload would not fit: with gradients, full state is 18 bytes for each weight, 8bit 10."""
AT_ONCE = {"8b-full": 2}
"""Rows that go through an H200 together where 4 would leave no room for activations, so that layers had to forget."""


def main() -> None:
    options = read_options()
    if options.one:
        get_ready(options)
        with redirect_stdout(sys.stderr):  # what a run says of its steps is no result
            made = train(options.one, options)
        print(json.dumps(made))
        return
    names = options.workloads or (["1b-full"] if options.tiny else WORKLOADS)
    if options.tiny:
        names = [f"tiny-{name.rpartition('-')[2]}" for name in names]
    has_failed = False
    for name in names:
        made = in_a_process(name)
        has_failed = has_failed or "error" in made
        with Path(options.output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(made) + "\n")
        print(line(made))
    sys.exit(has_failed)


def in_a_process(name: str) -> dict[str, Any]:
    """The result of a workload, or what kept it from having one. What it says of its steps is shown as it comes."""
    environment = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--one", name]
    last = "died"
    with (
        tempfile.TemporaryFile("w+") as printed,
        subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        for said in process.stderr:
            sys.stderr.write(said)
            last = said.strip() or last
        if process.wait():
            return {"workload": name, "error": last}
        printed.seek(0)
        return json.loads(printed.read().strip().splitlines()[-1])


def get_ready(options: argparse.Namespace) -> None:
    """All that takes time and no GPU; then wait for the file that says it is our turn, if there is to be one."""
    from importlib import import_module

    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    import training_hub.backends.torch_engine.engine  # noqa: F401

    if options.one.endswith("lora"):
        import_module("peft")
    while options.after is not None and not Path(options.after).exists():
        time.sleep(0.05)


def train(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train `name` here, from random weights."""
    import torch
    from materials import byte_tokenizer

    from training_hub.algorithms import ALGORITHMS as KNOWN
    from training_hub.backends import Given
    from training_hub.launch import run

    size, _, method = name.rpartition("-")
    if ALGORITHMS[method] not in KNOWN:
        return {"workload": name, "error": f"there is no algorithm {ALGORITHMS[method]} yet"}
    length, rows = (64, 4) if size == "tiny" else (options.length, options.rows)
    model = random_model(SHAPES[size])
    given = Given(
        model=model,
        tokenizer=byte_tokenizer(iter(["a few words"]), 300),
        rows=random_rows(rows * options.steps, length, 256),
    )
    with tempfile.TemporaryDirectory(prefix="training-hub-gpu-") as folder:
        result = run(recipe(name, folder, rows, length, options), given)
        profile = Path(folder, "out", "profile.json")
        split = json.loads(profile.read_text()) if profile.exists() else None
    taken_apart = split["steps"] if split else []
    measured = [row for row in result.history[options.warm_up :] if row["step"] not in taken_apart]
    if not measured:
        return {"workload": name, "error": f"of {len(result.history)} steps none was left to measure: ask for more"}
    seconds = sum(row["step_seconds"] for row in measured)
    tokens = sum(row["tokens"] for row in measured)
    on_gpu = torch.cuda.is_available()
    return {
        "workload": name,
        "tokens_per_second": tokens / seconds,
        "target": TARGETS.get(name),
        "memory_gib": result.metrics["memory_gib"],
        "planned_gib": result.plan["memory_gib"]["total"],
        "fraction_of_peak": sum(row["peak_fraction"] * row["step_seconds"] for row in measured) / seconds,
        "peak_tflops": result.metrics["peak_tflops"],
        "losses": [row["loss"] for row in result.history],
        "step_seconds": [row["step_seconds"] for row in measured],
        "split": split,
        "parameters": result.plan["parameters"],
        "length": length,
        "rows_per_step": rows,
        "tokens_per_pack": result.plan["tokens_per_pack"],
        "dtype": result.plan["dtype"],
        "activation_checkpointing": result.plan["activation_checkpointing"],
        "settings": [*(f"{key}={value}" for key, value in OWN.get(name, {}).items()), *options.set],
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def recipe(name: str, folder: str, rows: int, length: int, options: argparse.Namespace) -> Any:
    from training_hub.recipe.load import build, layer_of, merge, overrides

    settings = {
        "algorithm": ALGORITHMS[name.rpartition("-")[2]],
        "output": f"{folder}/out",
        "model.path": "(random weights)",
        "model.dtype": "auto",
        "data.path": "(random tokens)",
        "data.cache": False,
        "training.steps": options.steps,
        "training.global_batch_size": rows,
        "training.max_seq_len": length,
        "training.max_tokens_per_gpu": (options.rows_at_once or AT_ONCE.get(name, 4)) * length,
        "training.preflight": False,
        "optimizer.lr": 1e-5,
        "checkpoint.final": False,
        "checkpoint.minutes": None,
        "monitoring.console": "plain",
        "monitoring.profile": options.profile,
        **OWN.get(name, {}),
    }
    layer = merge(layer_of(settings), overrides(options.set))
    return build(layer.values, problems=layer.problems)


def random_model(shape: dict[str, Any]) -> Any:
    """A model of this shape on the device, its matrices drawn there: the CPU would take minutes for billions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = shape["model_type"], {name: value for name, value in shape.items() if name != "model_type"}
    config = AutoConfig.for_model(kind, **own, max_position_embeddings=8192, use_cache=False)
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)


def random_rows(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    import numpy as np

    draw = np.random.default_rng(0)
    rows = (draw.integers(3, vocabulary, length).tolist() for _ in range(count))
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def line(made: dict[str, Any]) -> str:
    if "error" in made:
        return f"{made['workload']:<12} {made['error']}"
    target = f" (target {made['target']:,})" if made["target"] else ""
    return (
        f"{made['workload']:<12} {made['tokens_per_second']:>10,.0f} tokens/s{target}, {made['memory_gib']:.1f} GiB, "
        f"{made['fraction_of_peak']:.1%} of {made['peak_tflops']:.3g} TFLOP/s, {made['device']}"
    )


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    reader.add_argument("--tiny", action="store_true", help="a tiny model on whatever device there is")
    reader.add_argument("--length", type=int, default=4096, help="tokens of each row")
    reader.add_argument("--rows", type=int, default=16, help="rows of one optimizer step")
    reader.add_argument("--rows-at-once", type=int, help="rows that go through the GPU together; default: 4, 8b-full 2")
    reader.add_argument("--steps", type=int, default=13, help="steps of a run")
    reader.add_argument("--warm-up", type=int, default=3, help="the first of them, which are not counted")
    reader.add_argument("--profile", action="store_true", help="take three steps apart (monitoring.profile)")
    reader.add_argument("--set", nargs="*", default=[], metavar="SECTION.FIELD=VALUE", help="other settings")
    reader.add_argument("--output", default=str(HERE / "gpu.jsonl"), help="file to which a line each is appended")
    reader.add_argument("--after", metavar="FILE", help="get ready, but leave the GPU alone until this file is there")
    reader.add_argument("--one", help=argparse.SUPPRESS)
    options = reader.parse_args()
    unknown = set(options.workloads) - set(WORKLOADS)
    if unknown:
        reader.error(f"workloads are {', '.join(WORKLOADS)}; got {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
