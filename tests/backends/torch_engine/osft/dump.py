"""Dumps of the reference implementation (mini_trainer 0.9.0): a Llama of two layers, five steps of four documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from training_hub.backends.torch_engine.adaptations.osft.optimizer import OsftOptimizer

DOCUMENTS = 4


def dump_folder(test_data: Path, name: str) -> Path:
    return test_data / "osft_reference" / name


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def model_of(folder: Path) -> LlamaForCausalLM:
    """The model with the dump's first weights, in its number format."""
    content = {key: value for key, value in settings(folder)["llama_config"].items() if key != "dtype"}
    # The dump's own attention, which takes its softmax in float32 whatever the format of the model.
    model = LlamaForCausalLM(LlamaConfig(**content, attn_implementation="eager")).to(
        getattr(torch, settings(folder)["settings"]["dtype"])
    )
    model.load_state_dict(load_file(folder / "init.safetensors"))
    return model.train()


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """input_ids, labels and position_ids of each step, [1, tokens]: four documents end to end."""
    found = load_file(folder / "batches.safetensors")
    keys = ("input_ids", "labels", "position_ids")
    return [{key: found[f"{number}.{key}"] for key in keys} for number in range(len(steps(folder)))]


def rows(folder: Path) -> list[dict[str, list[int]]]:
    """The documents of all steps in their order, as rows of tokenised data."""
    return [
        {"input_ids": ids, "labels": labels}
        for batch in batches(folder)
        for ids, labels in zip(
            *(batch[key].reshape(DOCUMENTS, -1).tolist() for key in ("input_ids", "labels")), strict=True
        )
    ]


def projectors(folder: Path, state: str) -> dict[str, tuple[Tensor, Tensor]]:
    """U_h U_h^T and V_h^T V_h of each target. Columns are never compared: their signs and turns are no one's."""
    factors = load_file(folder / f"factors_{state}.safetensors")
    names = {key.partition("::")[0] for key in factors}
    return {
        name: (
            factors[f"{name}::U_high"] @ factors[f"{name}::U_high"].T,
            factors[f"{name}::V_high"].T @ factors[f"{name}::V_high"],
        )
        for name in names
    }


def optimizer_of(folder: Path, model: nn.Module) -> OsftOptimizer:
    asked = settings(folder)["settings"]
    return OsftOptimizer(
        model,
        torch.optim.AdamW,
        unfreeze_rank_ratio=asked["unfreeze"],
        lr=asked["lr"],
        betas=tuple(asked["betas"]),
        eps=asked["eps"],
        weight_decay=asked["weight_decay"],
    )


def step(model: nn.Module, optimizer: OsftOptimizer, inputs: dict[str, Tensor], labels: Tensor) -> tuple[float, float]:
    """One step of the dump's loop; its loss and gradient norm."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()
