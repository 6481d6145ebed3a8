"""One side of a comparison, in a process of its own: trains, and prints one line of JSON.

`python benchmarks/side.py SIDE MODEL DATA OUT STEPS BATCH MAX_LENGTH DTYPE`; SIDE is ours, trl or trl-best.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Steps that build caches and kernels; left out of the rates.
WARM_UP = 2
LEARNING_RATE = 1e-4


def ours(model: Path, data: Path, out: Path, steps: int, batch: int, max_length: int, dtype: str) -> dict[str, Any]:
    from training_hub import sft

    result = sft(
        str(model),
        str(data),
        str(out),
        backend="torch",
        max_steps=steps,
        effective_batch_size=batch,
        max_seq_len=max_length,
        learning_rate=LEARNING_RATE,
        overrides={
            "model.dtype": dtype,
            "lr_scheduler.name": "constant",
            "data.overlong": "truncate",
            "data.cache": False,
            "monitoring.console": "off",
            "checkpoint.final": False,
            "checkpoint.minutes": None,
            **json.loads(sys.argv[9] if len(sys.argv) > 9 else "{}"),
        },
    )
    rows = result.history[WARM_UP:]
    return {
        "seconds": [row["step_seconds"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "trained_tokens": [row["trained_tokens"] for row in rows],
        "loss": [row["loss"] for row in result.history],
        "padded_fraction": 0.0,
    }


def trl(model: Path, data: Path, out: Path, steps: int, batch: int, max_length: int, dtype: str) -> dict[str, Any]:
    return _trl(model, data, out, steps, batch, max_length, bf16=dtype == "bfloat16")


def trl_best(model: Path, data: Path, out: Path, steps: int, batch: int, max_length: int, dtype: str) -> dict[str, Any]:
    """The flags that were fastest on CPU: packing, and no activation checkpointing."""
    return _trl(
        model, data, out, steps, batch, max_length, bf16=dtype == "bfloat16", packing=True, gradient_checkpointing=False
    )


def _trl(model: Path, data: Path, out: Path, steps: int, batch: int, max_length: int, **options: Any) -> dict[str, Any]:
    import datasets
    from materials import MARKED_TEMPLATE
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds between ends of steps, and the useful tokens of each, counted from the batches themselves."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = MARKED_TEMPLATE
    clock = Clock()
    counted: list[tuple[int, int, int]] = []
    packing = options.get("packing", False)
    trainer = SFTTrainer(
        model=str(model),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=steps,
            # A packed row holds several samples, so fewer rows carry the same tokens.
            per_device_train_batch_size=max(1, batch // 4) if packing else batch,
            max_length=max_length,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            assistant_only_loss=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        ),
        train_dataset=datasets.load_dataset("json", data_files=str(data), split="train"),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def counting(rows: Any) -> Any:
        made = collate(rows)
        mask = made.get("attention_mask")
        useful = int(mask.sum()) if mask is not None else made["input_ids"].numel()
        counted.append((useful, int((made["labels"] != -100).sum()), made["input_ids"].numel()))
        return made

    trainer.data_collator = counting
    trainer.train()
    spans = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][WARM_UP - 1 :]
    rows = counted[WARM_UP : WARM_UP + len(spans)]
    return {
        "seconds": spans,
        "tokens": [row[0] for row in rows],
        "trained_tokens": [row[1] for row in rows],
        "loss": clock.losses,
        "padded_fraction": 1 - sum(row[0] for row in rows) / sum(row[2] for row in rows),
    }


SIDES = {"ours": ours, "trl": trl, "trl-best": trl_best}


def main() -> None:
    side, model, data, out, steps, batch, max_length, dtype = sys.argv[1:9]
    measured = SIDES[side](Path(model), Path(data), Path(out), int(steps), int(batch), int(max_length), dtype)
    rates = [tokens / seconds for tokens, seconds in zip(measured["tokens"], measured["seconds"], strict=True)]
    print(
        json.dumps(
            {
                "side": side,
                "tokens_per_second": sum(measured["tokens"]) / sum(measured["seconds"]),
                "median_step_rate": statistics.median(rates),
                "trained_tokens_per_second": sum(measured["trained_tokens"]) / sum(measured["seconds"]),
                "padded_fraction": measured["padded_fraction"],
                "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "first_loss": measured["loss"][0],
                "last_loss": measured["loss"][-1],
                "steps": int(steps),
            }
        )
    )


if __name__ == "__main__":
    main()
