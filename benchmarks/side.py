"""One side of a comparison, in a process of its own: trains, and prints one line of JSON.

`python benchmarks/side.py SIDE ORDER.json`; SIDE is a name in SIDES, ORDER.json holds an Order.

Every side takes the rows in the order of the file, with the same model, learning rate and number format. A step counts
from the end of the one before it, so waiting for data counts. Tokens are counted in the batches themselves.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Steps that build caches and kernels; left out of the rates.
WARM_UP = 2
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Order:
    """What to train: folders and file, and settings that all sides share. overrides: for ours, by path."""

    model: str
    data: str
    out: str
    steps: int
    batch: int
    max_length: int
    dtype: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """What one side did, step by step, warm-up left out; `losses` of all steps. operations: those the tokens need.

    processor_seconds: of all threads together, in all of these steps.
    """

    seconds: list[float]
    processor_seconds: float
    tokens: list[int]
    trained_tokens: list[int]
    operations: float
    losses: list[float]
    padded_fraction: float = 0.0


def ours(order: Order) -> Measured:
    from training_hub import sft

    spent: list[float] = []
    result = sft(
        order.model,
        order.data,
        order.out,
        backend="torch",
        max_steps=order.steps,
        effective_batch_size=order.batch,
        max_seq_len=order.max_length,
        learning_rate=LEARNING_RATE,
        callbacks=lambda _: spent.append(time.process_time()),
        overrides={
            "model.dtype": order.dtype,
            "lr_scheduler.name": "constant",
            "optimizer.beta2": 0.999,  # as the others have it
            "data.overlong": "truncate",
            "data.shuffle": False,
            "data.cache": False,
            "monitoring.console": "off",
            "checkpoint.final": False,
            "checkpoint.minutes": None,
            **order.overrides,
        },
    )
    ends = [row["time"] for row in result.history]
    rows = result.history[WARM_UP:]
    peak = result.metrics["peak_tflops"] * 1e12
    return Measured(
        seconds=[b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)],
        processor_seconds=spent[-1] - spent[WARM_UP - 1],
        tokens=[row["tokens"] for row in rows],
        trained_tokens=[row["trained_tokens"] for row in rows],
        operations=sum(row["peak_fraction"] * row["step_seconds"] * peak for row in rows),
        losses=[row["loss"] for row in result.history],
    )


def trl(order: Order, **flags: Any) -> Measured:
    """SFTTrainer with its defaults, but for the number format where it is float32."""
    import datasets
    from materials import MARKED_TEMPLATE
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(order.model)
    tokenizer.chat_template = MARKED_TEMPLATE
    # A packed row holds several samples, so fewer rows carry the same tokens.
    rows = max(1, order.batch // 4) if flags.get("packing") else order.batch
    settings = SFTConfig(
        **_shared_settings(order, rows), max_length=order.max_length, assistant_only_loss=True, **flags
    )
    trainer = SFTTrainer(
        model=order.model,
        args=settings,
        train_dataset=datasets.load_dataset("json", data_files=order.data, split="train"),
        processing_class=tokenizer,
    )
    return _watched(trainer)


def trl_unchecked(order: Order) -> Measured:
    """Without activation checkpointing, which costs a forward pass more and saves memory that is there."""
    return trl(order, gradient_checkpointing=False)


def trl_best(order: Order) -> Measured:
    """The flags that were fastest on a CPU with AMX: packing, and no activation checkpointing."""
    return trl(order, packing=True, gradient_checkpointing=False)


def transformers(order: Order) -> Measured:
    """The plain Trainer: rows tokenised before, padded batches, loss on the same tokens."""
    import datasets
    from materials import MARKED_TEMPLATE
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(order.model)

    def tokenised(row: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            row["messages"],
            chat_template=MARKED_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        # Cut here: the library gives a row that it cuts itself no mask.
        ids, mask = (made[name][: order.max_length] for name in ("input_ids", "assistant_masks"))
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    data = datasets.load_dataset("json", data_files=order.data, split="train")
    data = data.map(tokenised, remove_columns=data.column_names)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(order.model, dtype=torch.float32),
        args=TrainingArguments(**_shared_settings(order, order.batch)),
        # The others leave out rows that are cut before their first trained token.
        train_dataset=data.filter(lambda row: any(label != -100 for label in row["labels"])),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return _watched(trainer)


def _shared_settings(order: Order, rows: int) -> dict[str, Any]:
    return {
        "output_dir": order.out,
        "max_steps": order.steps,
        "per_device_train_batch_size": rows,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": order.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _watched(trainer: Any) -> Measured:
    """Train, with the clock read at the end of each step and the tokens of each batch counted where they are made."""
    from transformers import TrainerCallback

    from training_hub.backends.torch_engine.planning.work import work_of

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.spent: list[float] = []
            self.losses: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())
            self.spent.append(time.process_time())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    clock, work = Clock(), work_of(trainer.model)
    batches: list[tuple[list[int], int, int]] = []  # lengths of samples, trained tokens, all places
    collate: Callable[[Any], Any] = trainer.data_collator

    def counting(rows: Any) -> Any:
        made = collate(rows)
        batches.append((_lengths(made), int((made["labels"] != -100).sum()), made["input_ids"].numel()))
        return made

    trainer.data_collator = counting
    trainer.add_callback(clock)
    trainer.train()
    spans = [b - a for a, b in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)]
    taken = batches[WARM_UP : WARM_UP + len(spans)]
    return Measured(
        seconds=spans,
        processor_seconds=clock.spent[-1] - clock.spent[WARM_UP - 1],
        tokens=[sum(lengths) for lengths, _, _ in taken],
        trained_tokens=[trained for _, trained, _ in taken],
        operations=sum(work.of_lengths(lengths, trained) for lengths, trained, _ in taken),
        losses=clock.losses,
        padded_fraction=1 - sum(sum(one[0]) for one in taken) / sum(one[2] for one in taken),
    )


def _lengths(batch: Any) -> list[int]:
    """Tokens of each sample: where positions begin anew in packed rows, else by the mask."""
    if "position_ids" in batch:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], batch["input_ids"].numel()]
        return [end - start for start, end in zip(starts, ends, strict=True)]
    return batch["attention_mask"].sum(1).tolist()


SIDES: dict[str, Callable[[Order], Measured]] = {
    "ours": ours,
    "trl": trl,
    "trl-kept": trl,
    "trl-unchecked": trl_unchecked,
    "trl-best": trl_best,
    "transformers": transformers,
}


def main() -> None:
    side, path = sys.argv[1:3]
    order = Order(**json.loads(Path(path).read_text(encoding="utf-8")))
    from training_hub.backends.torch_engine.planning.work import measured_peak
    from training_hub.monitoring.throughput import memory_gib

    measured = SIDES[side](order)
    # Before a peak is measured, which takes memory of its own.
    memory = memory_gib()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = sum(measured.seconds)
    made = {
        "side": side,
        "tokens_per_second": sum(measured.tokens) / seconds,
        "tokens_per_processor_second": sum(measured.tokens) / measured.processor_seconds,
        "trained_tokens_per_second": sum(measured.trained_tokens) / seconds,
        "step_tokens_per_second": [
            round(tokens / taken, 1) for tokens, taken in zip(measured.tokens, measured.seconds, strict=True)
        ],
        "padded_fraction": measured.padded_fraction,
        "operations_per_second": measured.operations / seconds,
        "peak_memory_gib": memory,
        "losses": measured.losses,
        "trained_tokens": sum(measured.trained_tokens),
        "peak": measured_peak(device, getattr(torch, order.dtype)),
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
    }
    print(json.dumps(made))


def allocator() -> str:
    """What gives out memory in this process, as far as its environment says; ours may set thresholds by itself."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "LD_PRELOAD"}
    return ", ".join(f"{name}={value}" for name, value in sorted(chosen.items())) or "glibc as it is"


if __name__ == "__main__":
    main()
