"""What lies beside the weights of a final model: where generation stops, the tokenizer, the chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def set_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Add `stop_ids` to the end-of-sequence ids in generation_config.json at `path`, which is made if need be.

    A model that learned to end its turn with <|im_end|> must also be stopped there by generate().
    """
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = content.get("eos_token_id")
    listed = [] if known is None else [known] if isinstance(known, int) else list(known)
    listed += [token for token in stop_ids if token not in listed]
    if listed:
        content["eos_token_id"] = listed[0] if len(listed) == 1 else listed
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: Any, chat_template: str | None, folder: Path) -> None:
    """Write the tokenizer with the chat template that was used in training."""
    before = tokenizer.chat_template
    tokenizer.chat_template = chat_template if chat_template is not None else before
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = before
    _forget_how_it_was_loaded(folder / "tokenizer_config.json")


def _forget_how_it_was_loaded(path: Path) -> None:
    # transformers 5.23 writes the arguments of from_pretrained into the file, and so where the folder came from.
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
