"""Whether a checkpoint was written by this very run: what decides its numbers, then and now."""

from __future__ import annotations

import json
from typing import Any

from training_hub.recipe import Recipe

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")
"""Keys of a model's config that may change without changing what it computes."""

Shapes = dict[str, tuple[int, ...]]


def model_facts(config: Any) -> dict[str, Any]:
    """A model's config as plain JSON, without what may change."""
    content = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in content.items() if key not in VOLATILE and not key.startswith("_")}


def changed_facts(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What `before` says otherwise than `now`, of data, tokenizer, teacher and model."""
    lines = [
        f"{name}: was {before.get(name)!r}, now {now.get(name)!r}"
        for name in ("data_fingerprint", "tokenizer_fingerprint", "teacher_fingerprint")
        if before.get(name) != now.get(name)
    ]
    # Another version of transformers knows other keys of the same model; those that both know must agree.
    old, new = before.get("model_config") or {}, now["model_config"]
    return lines + [
        f"model config.{key}: was {old[key]!r}, now {new[key]!r}"
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key]
    ]


def changed_shapes(before: Shapes, now: Shapes) -> list[str]:
    """Weights that one of the two lacks, or has in another shape."""
    return [
        f"weight {name}: was {before.get(name, 'not there')}, now {now.get(name, 'not there')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def other_engine(facts: dict[str, Any], recipe: Recipe, engine: str) -> list[str]:
    """Why the checkpoint that noted `facts` cannot be gone on with by this engine: each keeps OSFT's factors in its own
    way. Of other runs either reads what the other wrote."""
    wrote = facts.get("engine", "torch")
    if recipe.algorithm != "osft" or wrote == engine:
        return []
    return [f"backend: was {wrote}, now {engine}; a run of osft goes on in the engine that began it"]
