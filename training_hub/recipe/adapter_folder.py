"""What the folder of an adapter says of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's files."""

BASE = "base_model_name_or_path"
"""Where PEFT's configuration names the base."""

ORIGIN_FILE = "trained_beside.json"
"""What PEFT's configuration has no field for: in how many bits the base was there, how it rounded, and in what format
it computed."""


def said_in(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in the folder, as far as it can be read."""
    try:
        said = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the adapter tells what is wrong with it
        return {}
    return said if isinstance(said, dict) else {}


def origin_of(folder: Path) -> dict[str, Any]:
    """What the folder of an adapter says of its base: path, revision, quantization, dtype, and qat, by fields."""
    said = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    noted = folder / ORIGIN_FILE
    ours = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    return {
        "path": said.get(BASE),
        "revision": said.get("revision"),
        "quantization": ours.get("quantization", "none"),
        "dtype": ours.get("dtype"),
        "qat": ours.get("qat", {}),
    }
