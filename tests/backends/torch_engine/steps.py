"""Steps of whole runs, of every kind that differs in what runs on the device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.invariants.run import recipe
from training_hub.backends import Given
from training_hub.backends.torch_engine import engine as engines
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.loop import accumulate
from training_hub.backends.torch_engine.run import Run
from training_hub.monitoring.console import SilentConsole
from training_hub.types import Batch

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "split masters": {"optimizer": {"state": "split"}},
    "8-bit moments": {"optimizer": {"state": "8bit"}},
    "lora": {"algorithm": "lora_sft"},
    "lora with dropout": {"algorithm": "lora_sft", "lora": {"dropout": 0.1}},
    "osft": {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.3}},
    "full checkpointing": {"training": {"activation_checkpointing": "full"}},
    "selective checkpointing": {"training": {"activation_checkpointing": "selective"}},
    "noise": {"loss": {"neftune_noise_alpha": 5.0}},
    "other losses": {"loss": {"label_smoothing": 0.1, "z_loss": 1e-4}},
    "RMSprop": {"optimizer": {"name": "RMSprop"}},
}


def assembled(case: str, device: torch.device, model: Path, data: Path, output: Path) -> Run:
    """A run in bfloat16 at step 0, of two sources, with packs of which a step has several."""
    other = shutil.copy(data, output / "other.jsonl")
    sections = {**CASES[case], "model": {"dtype": "bfloat16"}, "data": {"path": [str(data), str(other)]}}
    sections["training"] = {"max_seq_len": 128, "max_tokens_per_gpu": 128, **CASES[case].get("training", {})}
    made = recipe(model, data, output, **sections)
    console = SilentConsole()
    materials = engines.load_materials(made, Given(), console)
    loaded = load_model(made, device, torch.bfloat16)
    run = engines.assemble(made, loaded, materials, device, torch.bfloat16, console)
    assert run.by_source is not None and len(run.feed.batch(1, 0, 1).packs) > 1
    engines.forget_activations(run, made.training.activation_checkpointing.replace("auto", "none"))
    return run


def gradients(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """The first half of `take_step`, up to where it reads what this gives: the mean loss and the gradient's norm."""
    return accumulate(run, batch), run.updater.clip()


def update(run: Run) -> None:
    """The second half, which moves the weights."""
    run.adaptation.before_step(1e-4)
    run.updater.step(1e-4)
    run.adaptation.after_step()
