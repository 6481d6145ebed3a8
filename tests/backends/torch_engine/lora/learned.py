"""Folders of adapters that have learned, as PEFT writes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.adaptations.lora.configs import make_config


def learned_adapter(model: Path, folder: Path, lora: dict[str, Any], *, seed: int = 1) -> Path:
    """`folder`, which now holds the adapter that the section asks for, beside the model: it began as PEFT has it begin,
    and each number that trains has moved at random. seed: what the start is drawn from, where it is drawn."""
    asked = recipe(model, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", lora=lora)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = make_config(asked, asked.lora.trainable_tokens)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = library.load().get_peft_model(base, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
