"""EasyDeL's SFTTrainer in a process of its own, by the Python that has EasyDeL: `easydel_side.py ORDER.json`.

Trains what the order says and prints one line of JSON: what `second_engine.py` tells of an engine. The trainer runs
unpacked, since with packing it crashes or trains on padding, with its loss on the assistant's tokens. Tokens are
counted in the batches themselves. It divides the sum of losses by all tokens that are no padding but the first of each
row, and not by those that are trained: `losses` are what it reports times the one over the other, which is the mean
over trained tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("EASYDEL_AUTO", "0")  # it would write to this process's environment, and start services

from materials import MARKED_TEMPLATE


def train(order: dict[str, Any]) -> dict[str, Any]:
    """One run: tokens, seconds, seconds of processor of the steps that count, and the losses of all."""
    import datasets
    import easydel
    import jax.numpy as jnp
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    tokenizer.chat_template = MARKED_TEMPLATE
    batches: list[tuple[int, int, int, int]] = []  # tokens, trained tokens, all places, what the loss is divided by
    marks: list[tuple[float, float]] = []
    losses: list[float] = []

    class Watched(easydel.SFTTrainer):  # type: ignore[misc, name-defined]
        def _preprocess_batch_input(self, state: Any, batch: Any, is_train: bool) -> Any:
            batch, told = super()._preprocess_batch_input(state=state, batch=batch, is_train=is_train)
            mask, labels = np.asarray(batch["attention_mask"]), np.asarray(batch["labels"])
            # The first token of a row is predicted by nothing.
            trained, divisor = int((labels[:, 1:] != -100).sum()), int(mask[:, 1:].sum())
            batches.append((int(mask.sum()), trained, mask.size, divisor))
            return batch, told

        def on_step_end(self, state: Any, metrics: Any, step: int) -> Any:
            marks.append((time.perf_counter(), time.process_time()))
            losses.append(float(metrics.loss))
            return super().on_step_end(state=state, metrics=metrics, step=step)

    computed = getattr(jnp, order["dtype"])
    began = time.perf_counter()
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        order["model"], dtype=computed, param_dtype=jnp.float32, auto_shard_model=True
    )
    arguments = easydel.SFTConfig(
        model_name="easydel",
        save_directory=order["output"],
        max_training_steps=order["steps"],
        num_train_epochs=1,
        total_batch_size=order["batch"],
        max_length=order["max_length"],
        learning_rate=order["learning_rate"],
        weight_decay=0.0,
        packing=False,
        assistant_only_loss=True,
        shuffle_train_dataset=False,
        use_wandb=False,
        do_last_save=False,
        save_optimizer_state=False,
        log_steps=1,
        report_steps=1,
        progress_bar_type="json",
    )
    rows = datasets.load_dataset("json", data_files=order["data"], split="train")
    trainer = Watched(arguments=arguments, model=model, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    left_out = order["left_out"]
    counted = batches[left_out : len(marks)]
    return {
        "tokens": sum(one[0] for one in counted),
        "trained_tokens": sum(one[1] for one in counted),
        "padded_fraction": 1 - sum(one[0] for one in counted) / sum(one[2] for one in counted),
        "seconds": marks[-1][0] - marks[left_out - 1][0],
        "processor_seconds": marks[-1][1] - marks[left_out - 1][1],
        "first_step_seconds": marks[0][0] - began,
        "reported_losses": losses,
        "losses": [loss * one[3] / one[1] for loss, one in zip(losses, batches, strict=False)],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("easydel", "jax", "jaxlib", "flax", "transformers", "torch", "numpy")}


if __name__ == "__main__":
    print(json.dumps(train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
