"""LoRA and QLoRA beside TRL with PEFT: `python benchmarks/lora.py` writes lora/RESULTS.md and lora/results.jsonl.

Each side trains in a process of its own, the sides in turn (A B A B ...), on the same weights, rows, rank, targets,
learning rate and number format: `ours` and `trl` train LoRA, `ours-4bit` and `trl-4bit` QLoRA (NF4 with quantised
scales). TRL has its defaults. The ratio is that of the medians of the rounds, and its spread the range of the ratios
round by round; by processor time the same is said of the time that all threads together spent on a processor, which
other work on the machine hardly changes. GSM8K is read from the folder named by TRAINING_HUB_TEST_DATA; without it
made-up rows stand in, and are named so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIDES = ("ours", "trl", "ours-4bit", "trl-4bit")
RANK, ALPHA = 16, 32
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    options = read_options()
    if options.one:
        print(json.dumps(train(options.one, Path(options.order))))
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="training-hub-lora-") as scratch:
        made = list(all_rounds(Path(scratch), options))
    with (output / "results.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in made)
    (output / "RESULTS.md").write_text(page(made), encoding="utf-8")
    print("\n".join(table(made)))


def all_rounds(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each side and round."""
    from compare import processor, rows_of
    from materials import make_model, texts_of, write_rows

    rows, source = rows_of("made-up" if options.size == "tiny" else "gsm8k")
    data = write_rows(folder / "rows.jsonl", rows)
    model = make_model(folder / "model", options.size, texts_of(rows))
    facts = {
        "run": time.strftime("%Y-%m-%d %H:%M:%S"),
        "size": options.size,
        "rows": source,
        "dtype": options.dtype,
        "steps": options.steps,
        "batch": options.batch,
        "threads": options.threads,
        "processor": processor(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    for number in range(options.rounds):
        for side in options.sides:
            order = {
                "model": str(model),
                "data": str(data),
                "out": str(folder / f"out-{side}-{number}"),
                "steps": options.steps,
                "batch": options.batch,
                "max_length": 1024,
                "dtype": options.dtype,
            }
            (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
            one = {**facts, "round": number, **in_a_process(side, folder / "order.json", options)}
            print(f"round {number + 1}: {side}: {one['seconds_per_step']:.2f} s a step", file=sys.stderr)
            yield one


def in_a_process(side: str, order: Path, options: argparse.Namespace) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(order.parent / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    command = [sys.executable, str(HERE / "lora.py"), "--one", side, "--order", str(order)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def train(side: str, path: Path) -> dict[str, Any]:
    """One side, here."""
    from side import Order

    from training_hub.monitoring.throughput import memory_gib

    order = Order(**json.loads(path.read_text(encoding="utf-8")))
    measured = (ours if side.startswith("ours") else trl)(order, is_4bit=side.endswith("4bit"))
    steps = len(measured.seconds)
    return {
        "side": side,
        "seconds_per_step": sum(measured.seconds) / steps,
        "processor_seconds_per_step": measured.processor_seconds / steps,
        "tokens_per_second": sum(measured.tokens) / sum(measured.seconds),
        "peak_memory_gib": memory_gib(),
        "trained_tokens": sum(measured.trained_tokens),
        "losses": measured.losses,
    }


def ours(order: Any, *, is_4bit: bool) -> Any:
    from side import LEARNING_RATE, WARM_UP, Measured

    from training_hub import lora_sft

    spent: list[float] = []
    result = lora_sft(
        order.model,
        order.data,
        order.out,
        backend="torch",
        lora_r=RANK,
        lora_alpha=ALPHA,
        load_in_4bit=is_4bit,
        max_steps=order.steps,
        effective_batch_size=order.batch,
        max_seq_len=order.max_length,
        learning_rate=LEARNING_RATE,
        callbacks=lambda _: spent.append(time.process_time()),
        overrides={
            "model.dtype": order.dtype,
            "lr_scheduler.name": "constant",
            "optimizer.beta2": 0.999,  # as the other has it
            "data.overlong": "truncate",
            "data.shuffle": False,
            "data.cache": False,
            "monitoring.console": "off",
            "checkpoint.final": False,
            "checkpoint.minutes": None,
        },
    )
    ends, rows = [row["time"] for row in result.history], result.history[WARM_UP:]
    return Measured(
        seconds=[b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)],
        processor_seconds=spent[-1] - spent[WARM_UP - 1],
        tokens=[row["tokens"] for row in rows],
        trained_tokens=[row["trained_tokens"] for row in rows],
        operations=0.0,
        losses=[row["loss"] for row in result.history],
    )


def trl(order: Any, *, is_4bit: bool) -> Any:
    """SFTTrainer with its defaults, given the model's folder, or for QLoRA the model that transformers loads of it."""
    import datasets
    import torch
    from materials import MARKED_TEMPLATE
    from peft import LoraConfig
    from side import _shared_settings, _watched
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(order.model)
    tokenizer.chat_template = MARKED_TEMPLATE
    model: Any = order.model
    if is_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, order.dtype),
        )
        model = AutoModelForCausalLM.from_pretrained(order.model, quantization_config=quantization, device_map="cpu")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_shared_settings(order, order.batch), max_length=order.max_length, assistant_only_loss=True),
        train_dataset=datasets.load_dataset("json", data_files=order.data, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
    )
    return _watched(trainer)


def table(made: Sequence[dict[str, Any]]) -> Iterator[str]:
    by_side: dict[str, list[dict[str, Any]]] = {}
    for one in made:
        by_side.setdefault(one["side"], []).append(one)
    yield (
        "| side | seconds a step (range) | processor seconds a step | memory GiB | loss first, last "
        "| ours is faster by (range) | by processor time (range) |"
    )
    yield "|---|---|---|---|---|---|---|"
    for side, rounds in by_side.items():
        mine = by_side.get(side.replace("trl", "ours"), rounds)
        taken = [one["seconds_per_step"] for one in rounds]
        cells = [
            side,
            f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})",
            f"{statistics.median(one['processor_seconds_per_step'] for one in rounds):.2f}",
            f"{max(one['peak_memory_gib'] for one in rounds):.2f}",
            f"{rounds[0]['losses'][0]:.4f}, {rounds[0]['losses'][-1]:.4f}",
            ratio(rounds, mine, "seconds_per_step"),
            ratio(rounds, mine, "processor_seconds_per_step"),
        ]
        yield f"| {' | '.join(cells)} |"


def ratio(rounds: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]], name: str) -> str:
    """The ratio of medians, and the range of the ratios round by round."""
    theirs, own = [one[name] for one in rounds], [one[name] for one in mine]
    ratios = [first / second for first, second in zip(theirs, own, strict=False)]
    return f"{statistics.median(theirs) / statistics.median(own):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def page(made: Sequence[dict[str, Any]]) -> str:
    first = made[0]
    told = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    rounds = 1 + max(one["round"] for one in made)
    return "\n".join(
        [
            "# LoRA and QLoRA beside TRL",
            "",
            *(__doc__ or "").strip().splitlines()[2:],
            "",
            f"Llama of size {first['size']}, rank {RANK} in all linear layers, {first['dtype']}, {first['rows']} rows, "
            f"{first['batch']} samples a step, {first['steps']} steps of which the first two are not counted, {rounds} "
            f"rounds, {first['threads']} threads.",
            "",
            *table(made),
            "",
            f"{first['run']}, {first['processor']}; {told}.",
            f"At the end {os.getloadavg()[2]:.1f} processes wanted one of {os.cpu_count()} cores, on average over 15 "
            "minutes.",
            "",
        ]
    )


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    reader.add_argument("--size", default="28m", help="a size of materials.py; tiny tries the script")
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--steps", type=int, default=5, help="the first two warm up")
    reader.add_argument("--batch", type=int, default=16, help="samples of a step")
    reader.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    reader.add_argument("--threads", type=int, default=os.cpu_count())
    reader.add_argument("--output", default=str(HERE / "lora"), help="folder of RESULTS.md and results.jsonl")
    reader.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    reader.add_argument("--order", help=argparse.SUPPRESS)
    return reader.parse_args()


if __name__ == "__main__":
    main()
